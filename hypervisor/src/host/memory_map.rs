//! The machine's RAM as the bootloader reports it, and the frames taken from it before the frame allocator is
//! there.

use memory::{Hpa, PAGE_SIZE, Pfn};

/// Spans that the map keeps; a firmware that reports more loses the smallest end of its list, with a message.
pub const SPANS_MAX: usize = 128;

/// Below this the trampoline, the BIOS data area and real-mode habits live: never handed out.
const LOW_END: u64 = 1 << 20;

/// A range of host physical memory, `start..end`, page-aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// First byte after.
    pub end: u64,
}

impl Span {
    /// Bytes in the span.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

/// A sorted list of spans, touching ones joined.
#[derive(Clone, Debug, Default)]
pub struct Spans(heapless::Vec<Span, SPANS_MAX>);

impl Spans {
    /// Adds a span. `false` if the list is full and the span is lost.
    #[must_use]
    pub fn add(&mut self, mut span: Span) -> bool {
        if span.bytes() == 0 {
            return true;
        }
        while let Some(at) = self.0.iter().position(|old| old.start <= span.end && span.start <= old.end) {
            let old = self.0.remove(at);
            span = Span { start: span.start.min(old.start), end: span.end.max(old.end) };
        }
        let at = self.0.iter().position(|old| old.start > span.start).unwrap_or(self.0.len());
        self.0.insert(at, span).is_ok()
    }

    /// The spans, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Span> + Clone + '_ {
        self.0.iter().copied()
    }

    /// Bytes in all spans.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.iter().map(Span::bytes).sum()
    }

    /// How many spans there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What is RAM, what of it is free, and what was taken early.
#[derive(Clone, Debug, Default)]
pub struct MemoryMap {
    /// All RAM that is ours, used or not: what the direct map covers.
    pub ram: Spans,
    /// Free frames at and above 1 MiB.
    pub free: Spans,
    /// Free pages below 1 MiB, without the page at 0.
    pub low: Spans,
    /// Spans that did not fit the lists.
    pub lost: usize,
    taken_frames: u64,
}

impl MemoryMap {
    /// Builds the map from the bootloader's regions: (start, end, free). Regions of other kinds are left out by
    /// the caller. Free spans shrink to whole pages.
    pub fn new(regions: impl Iterator<Item = (u64, u64, bool)>) -> Self {
        let mut map = Self::default();
        for (start, end, free) in regions {
            let span = if free {
                Span { start: start.next_multiple_of(PAGE_SIZE), end: end & !(PAGE_SIZE - 1) }
            } else {
                Span { start: start & !(PAGE_SIZE - 1), end: end.next_multiple_of(PAGE_SIZE) }
            };
            let mut kept = map.ram.add(span);
            if free {
                kept &= map.free.add(Span { start: span.start.max(LOW_END), end: span.end });
                kept &= map.low.add(Span { start: span.start.max(PAGE_SIZE), end: span.end.min(LOW_END) });
            }
            map.lost += usize::from(!kept);
        }
        map
    }

    /// Takes `pages` contiguous frames, lowest first.
    pub fn take(&mut self, pages: u64) -> Option<Hpa> {
        let bytes = pages.checked_mul(PAGE_SIZE)?;
        let span = self.free.0.iter_mut().find(|span| span.bytes() >= bytes)?;
        let start = span.start;
        span.start += bytes;
        self.taken_frames += pages;
        Some(Hpa(start))
    }

    /// Takes one frame.
    pub fn take_frame(&mut self) -> Option<Pfn> {
        self.take(1).map(Hpa::page)
    }

    /// A page below 1 MiB that a startup IPI can name (its number is the vector): the lowest free one.
    #[must_use]
    pub fn trampoline_page(&self) -> Option<Hpa> {
        // The VGA window and the ROMs begin at 0xa0000, whatever the firmware says.
        self.low
            .iter()
            .find(|span| span.bytes() >= PAGE_SIZE && span.start < 0xa_0000)
            .map(|span| Hpa(span.start))
    }

    /// Frames taken so far.
    #[must_use]
    pub fn taken_frames(&self) -> u64 {
        self.taken_frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(spans: &Spans) -> Vec<(u64, u64)> {
        spans.iter().map(|span| (span.start, span.end)).collect()
    }

    #[test]
    fn spans_are_sorted_and_joined() {
        let mut list = Spans::default();
        for (start, end) in [(0x5000, 0x6000), (0x1000, 0x2000), (0x2000, 0x3000), (0x2800, 0x5000), (9, 9)] {
            assert!(list.add(Span { start, end }));
        }
        assert_eq!(spans(&list), [(0x1000, 0x6000)]);
    }

    #[test]
    fn low_memory_and_partial_pages_are_not_handed_out() {
        let map = MemoryMap::new(
            [(0, 0x9_fc00, true), (0x10_0000, 0x20_0000, false), (0x20_0010, 0x40_0fff, true)].into_iter(),
        );
        assert_eq!(spans(&map.low), [(0x1000, 0x9_f000)]);
        assert_eq!(spans(&map.free), [(0x20_1000, 0x40_0000)]);
        assert_eq!(spans(&map.ram), [(0, 0x9_f000), (0x10_0000, 0x20_0000), (0x20_1000, 0x40_0000)]);
        assert_eq!(map.trampoline_page(), Some(Hpa(0x1000)));
    }

    #[test]
    fn frames_are_taken_once_until_there_are_none() {
        let mut map =
            MemoryMap::new([(0x10_0000, 0x10_3000, true), (0x20_0000, 0x20_8000, true)].into_iter());
        assert_eq!(map.take(4), Some(Hpa(0x20_0000)));
        assert_eq!(map.take_frame(), Some(Pfn(0x100)));
        assert_eq!(map.take(3), Some(Hpa(0x20_4000)));
        assert_eq!(map.take(3), None);
        assert_eq!(map.taken_frames(), 8);
        assert_eq!(map.take(u64::MAX), None);
    }

    #[test]
    fn a_list_that_overflows_says_so() {
        let map = MemoryMap::new((0..200u64).map(|i| (i << 24, (i << 24) + 0x1000, true)));
        assert!(map.lost > 0);
    }
}

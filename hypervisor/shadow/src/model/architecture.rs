//! Which translations the architecture lets a guest's processor use: those of its tables as they are, and older ones
//! that it may have cached and that no flush has ended.
//!
//! A processor may read a paging-structure entry at any time while its address space is in use, may keep what it read
//! in a paging-structure cache, and may put what a walk found into its TLB (SDM Vol. 3, "Caching Translation
//! Information"). So a translation is allowed if there are moments, one for each level from the top down, none earlier
//! than the one above, such that
//!
//! - at each of them the address space was in use by this processor under this PCID,
//! - the entry of that level said then what the translation needs, with A set (and D, for a write),
//! - no flush of the paging-structure caches lies between the first and the last,
//! - no flush of the page's translation lies after the last.

use std::vec::Vec;

use super::reference::{Attempt, CR4_PGE, Meaning, Path, Registers, permitted};

/// What a word of guest memory held before.
#[derive(Clone, Copy, Debug)]
struct Past {
    value: u64,
    from: u64,
    until: u64,
}

/// The words of guest memory that change, with what they held before.
#[derive(Debug)]
pub struct History {
    words: Vec<Word>,
}

#[derive(Debug)]
struct Word {
    gpa: u64,
    value: u64,
    since: u64,
    past: Vec<Past>,
}

impl History {
    /// The words at `gpas`, as `load` finds them at time 0.
    pub fn new(gpas: impl Iterator<Item = u64>, load: impl Fn(u64) -> u64) -> History {
        let words = gpas.map(|gpa| Word { gpa, value: load(gpa), since: 0, past: Vec::new() });
        let mut words: Vec<Word> = words.collect();
        words.sort_by_key(|word| word.gpa);
        History { words }
    }

    fn find(&self, gpa: u64) -> Option<&Word> {
        let at = self.words.binary_search_by_key(&(gpa & !7), |word| word.gpa).ok()?;
        Some(&self.words[at])
    }

    /// Notes what has changed by time `now`. Each change is told: address, old value, new value.
    pub fn observe(&mut self, now: u64, load: impl Fn(u64) -> u64, mut changed: impl FnMut(u64, u64, u64)) {
        for word in &mut self.words {
            let value = load(word.gpa);
            if value != word.value {
                changed(word.gpa, word.value, value);
                word.past.push(Past { value: word.value, from: word.since, until: now + 1 });
                word.value = value;
                word.since = now;
            }
        }
    }

    /// Forgets what no processor can have read after `time`.
    pub fn forget_before(&mut self, time: u64) {
        for word in &mut self.words {
            word.past.retain(|past| past.until > time);
        }
    }

    /// The values that the entry of `bytes` at `gpa` has and had, the present one first; a word that is not watched
    /// always held what `load` finds.
    fn values(&self, gpa: u64, bytes: u64, load: impl Fn(u64) -> u64) -> impl Iterator<Item = Past> {
        let word = self.find(gpa);
        let present = match word {
            Some(word) => Past { value: word.value, from: word.since, until: u64::MAX },
            None => Past { value: load(gpa & !7), from: 0, until: u64::MAX },
        };
        let past = word.map_or(&[][..], |word| &word.past);
        core::iter::once(present).chain(past.iter().rev().copied()).map(move |past| {
            let value = match bytes {
                4 => past.value >> (8 * (gpa & 4)) & 0xffff_ffff,
                _ => past.value,
            };
            Past { value, ..past }
        })
    }
}

/// A time during which an address space was in use, within one stretch without a flush of the paging-structure caches.
#[derive(Clone, Copy, Debug)]
struct Segment {
    /// CR3 without the PCID. (What another root of the same PCID left behind may be used too; the shadow never does.)
    root: u64,
    stretch: u32,
    from: u64,
    until: u64,
}

/// A flush of one address.
#[derive(Clone, Copy, Debug)]
struct Invlpg {
    when: u64,
    linear: u64,
    /// A global translation is flushed too, and in all spaces.
    global: bool,
}

/// One vCPU's use of one PCID since it was last flushed.
#[derive(Clone, Debug, Default)]
pub struct Space {
    segments: Vec<Segment>,
    stretch: u32,
    /// The flushes of single addresses.
    invlpgs: Vec<Invlpg>,
}

impl Space {
    /// It comes into use, with the tables at `root`.
    pub fn begin(&mut self, now: u64, root: u64) {
        self.segments.push(Segment { root, stretch: self.stretch, from: now, until: u64::MAX });
    }

    /// Another one comes into use.
    pub fn end(&mut self, now: u64) {
        if let Some(last) = self.segments.last_mut().filter(|last| last.until == u64::MAX) {
            last.until = now;
        }
    }

    /// The root that is in use.
    fn in_use(&self) -> Option<u64> {
        self.segments.last().filter(|last| last.until == u64::MAX).map(|last| last.root)
    }

    /// Everything cached for it is gone.
    pub fn flush(&mut self, now: u64) {
        let in_use = self.in_use();
        self.segments.clear();
        self.invlpgs.clear();
        self.stretch += 1;
        if let Some(root) = in_use {
            self.begin(now, root);
        }
    }

    /// The translation of `linear` is gone, and all paging-structure caches ("Operations that Invalidate TLBs and
    /// Paging-Structure Caches").
    pub fn invlpg(&mut self, now: u64, linear: u64) {
        self.end_stretch(now);
        self.invlpgs.push(Invlpg { when: now, linear, global: true });
    }

    /// INVPCID of type 0: the translation of `linear` is gone, unless it is a global one.
    pub fn flush_address(&mut self, now: u64, linear: u64) {
        self.invlpgs.push(Invlpg { when: now, linear, global: false });
    }

    fn end_stretch(&mut self, now: u64) {
        let in_use = self.in_use();
        self.end(now);
        self.stretch += 1;
        if let Some(root) = in_use {
            self.begin(now, root);
        }
    }

    /// From when on the space was in use without a flush of everything.
    pub fn since(&self) -> Option<u64> {
        self.segments.first().map(|first| first.from)
    }

    /// When the page of `1 << shift` bytes that holds `linear` was last flushed by its address; with `global`, by
    /// INVLPG alone.
    fn last_invlpg(&self, linear: u64, shift: u32, global: bool) -> u64 {
        let named =
            |invlpg: &&Invlpg| invlpg.linear >> shift == linear >> shift && (invlpg.global || !global);
        self.invlpgs.iter().rev().find(named).map_or(0, |invlpg| invlpg.when)
    }

    /// The earliest moment of `stretch` not before `least` at which the space was in use and `past` held.
    fn moment(&self, stretch: u32, least: u64, past: &Past) -> Option<u64> {
        let root = self.in_use()?;
        let mut segments =
            self.segments.iter().filter(|segment| segment.stretch == stretch && segment.root == root);
        segments.find_map(|segment| {
            let moment = least.max(segment.from).max(past.from);
            (moment < segment.until.min(past.until)).then_some(moment)
        })
    }
}

/// A translation that is looked into.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    pub linear: u64,
    pub attempt: Attempt,
    pub physical: u64,
}

/// What an answer is given from.
pub struct Question<'a, L: Fn(u64) -> u64> {
    pub registers: &'a Registers,
    pub history: &'a History,
    /// The space in use.
    pub space: &'a Space,
    /// This vCPU's spaces of all PCIDs: INVLPG of a global page counts for all of them.
    pub spaces: &'a [Space],
    pub load: L,
}

impl<L: Fn(u64) -> u64> Question<'_, L> {
    /// Whether the processor may use the translation.
    pub fn allows(&self, claim: &Claim) -> bool {
        let Some(top) = self.registers.top(claim.linear) else {
            return self.registers.cr0 & super::reference::CR0_PG == 0
                && claim.physical == claim.linear & 0xffff_ffff;
        };
        let newest = self.space.segments.last().map_or(0, |last| last.stretch);
        let oldest = self.space.segments.first().map_or(0, |first| first.stretch);
        (oldest..=newest).rev().any(|stretch| self.leads(claim, top.level, top.table, 0, stretch, Path::OPEN))
    }

    /// Whether the table of `level` at `table` leads where the claim says, with moments from `least` on.
    fn leads(&self, claim: &Claim, level: u8, table: u64, least: u64, stretch: u32, path: Path) -> bool {
        let registers = self.registers;
        let address = registers.entry_address(level, table, claim.linear);
        self.history.values(address, registers.entry_bytes(), &self.load).any(|past| {
            if past.value & 0x20 == 0 {
                return false; // A is set before anything is cached
            }
            match registers.meaning(level, past.value) {
                Meaning::Absent | Meaning::Reserved => false,
                Meaning::Table(next) => self.space.moment(stretch, least, &past).is_some_and(|moment| {
                    self.leads(claim, level - 1, next, moment, stretch, path.through(past.value))
                }),
                Meaning::Page { base, shift } => {
                    let global = past.value & 0x100 != 0 && registers.cr4 & CR4_PGE != 0;
                    let flushed = if global {
                        let each =
                            self.spaces.iter().map(|space| space.last_invlpg(claim.linear, shift, true));
                        each.max().unwrap_or(0)
                    } else {
                        self.space.last_invlpg(claim.linear, shift, false)
                    };
                    base | claim.linear & ((1 << shift) - 1) == claim.physical
                        && (!claim.attempt.write || past.value & 0x40 != 0)
                        && permitted(registers.controls(), path.through(past.value), claim.attempt)
                        && self.space.moment(stretch, least.max(flushed), &past).is_some()
                }
            }
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::model::reference::{CR0_PG, CR0_WP, CR4_PAE, EFER_LMA, EFER_NXE};

    const ALL: u64 = 0x67;
    const TABLES: [u64; 4] = [0x1000, 0x2000, 0x3000, 0x4000];

    struct World {
        history: History,
        memory: std::collections::HashMap<u64, u64>,
        space: Space,
        registers: Registers,
    }

    impl World {
        /// Linear page 0 at 0x5000, in use since time 2.
        fn new() -> World {
            let mut memory = std::collections::HashMap::new();
            for (table, next) in TABLES.into_iter().zip([0x2000, 0x3000, 0x4000, 0x5000]) {
                memory.insert(table, next | ALL);
            }
            let history = History::new(TABLES.into_iter(), |gpa| memory[&gpa]);
            let mut space = Space::default();
            space.begin(2, 0x1000);
            let registers = Registers {
                cr0: CR0_PG | CR0_WP,
                cr3: 0x1000,
                cr4: CR4_PAE,
                efer: EFER_LMA | EFER_NXE,
                maxphyaddr: 40,
                ..Registers::default()
            };
            World { history, memory, space, registers }
        }

        fn write(&mut self, now: u64, gpa: u64, value: u64) {
            self.memory.insert(gpa, value);
            self.history.observe(now, |gpa| self.memory[&gpa], |_, _, _| ());
        }

        fn allows(&self, physical: u64, write: bool) -> bool {
            let question = Question {
                registers: &self.registers,
                history: &self.history,
                space: &self.space,
                spaces: core::slice::from_ref(&self.space),
                load: |gpa| self.memory.get(&gpa).copied().unwrap_or(0),
            };
            let attempt = Attempt { write, ..Attempt::default() };
            question.allows(&Claim { linear: 0, attempt, physical })
        }
    }

    #[test]
    fn what_was_overwritten_is_allowed_until_the_flush_of_its_address() {
        let mut world = World::new();
        assert!(world.allows(0x5000, true));
        world.write(4, 0x4000, 0x6000 | ALL);
        assert!(world.allows(0x5000, true) && world.allows(0x6000, true));
        world.space.invlpg(6, 0x10_0000);
        assert!(world.allows(0x5000, true), "another address");
        world.space.invlpg(8, 0);
        assert!(!world.allows(0x5000, true));
        assert!(world.allows(0x6000, true));
    }

    #[test]
    fn a_cached_upper_entry_and_a_newer_lower_one_go_together_until_any_invlpg() {
        let mut world = World::new();
        // The page directory's entry leads elsewhere; then the old leaf table changes.
        world.write(4, 0x3000, 0x7000 | ALL);
        world.write(6, 0x4000, 0x6000 | ALL);
        assert!(world.allows(0x6000, false), "by the cached directory entry");
        world.space.invlpg(8, 0x10_0000);
        assert!(!world.allows(0x8000, false));
        assert!(world.allows(0x5000, false), "a whole translation cached before");
        world.write(10, 0x4000, 0x8000 | ALL);
        assert!(!world.allows(0x8000, false), "the directory entry is cached no more");
    }

    #[test]
    fn an_older_lower_entry_does_not_go_with_a_newer_upper_one() {
        let mut world = World::new();
        world.write(4, 0x4000, 0x6000 | ALL);
        world.write(6, 0x3000, 0x4000 | ALL & !2);
        // Read-only now; the page at 0x5000 was gone by then, but its old translation is whole.
        assert!(world.allows(0x5000, true) && world.allows(0x6000, true));
        world.space.flush(8);
        assert!(world.allows(0x6000, false));
        assert!(!world.allows(0x5000, false) && !world.allows(0x6000, true));
    }

    #[test]
    fn only_what_was_there_while_the_space_was_in_use_counts() {
        let mut world = World::new();
        world.space.end(4);
        world.write(6, 0x4000, 0x6000 | ALL);
        world.write(10, 0x4000, 0x7000 | ALL);
        world.space.begin(14, 0x1000);
        assert!(world.allows(0x5000, false) && world.allows(0x7000, false));
        assert!(!world.allows(0x6000, false), "it came and went meanwhile");
    }

    #[test]
    fn nothing_without_a_and_no_write_without_d() {
        let mut world = World::new();
        world.write(4, 0x4000, 0x6000 | ALL & !0x40);
        assert!(world.allows(0x6000, false) && !world.allows(0x6000, true));
        world.write(6, 0x4000, 0x7000 | ALL & !0x20);
        assert!(!world.allows(0x7000, false));
    }
}

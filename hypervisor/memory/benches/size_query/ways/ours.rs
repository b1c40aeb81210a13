//! The product's counters.

use memory::Counters;
use memory::counters::Writer;

use super::{Answer, Core, Way};

impl Way for Counters {
    type Core<'a> = Writer<'a>;

    fn core(&self, core: usize) -> Writer<'_> {
        self.writer(core).expect("asked for once")
    }

    fn query(&self) -> Answer {
        self.shadow_pages().into()
    }
}

impl Core for Writer<'_> {
    #[inline]
    fn allocated(&mut self, _: usize) {
        self.shadow_page_allocated();
    }

    #[inline]
    fn freed(&mut self, _: usize) {
        self.shadow_pages_freed(1);
    }
}

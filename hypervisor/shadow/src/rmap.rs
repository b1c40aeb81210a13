//! What is kept for every page and every 2 MiB block of a guest's RAM.

use crate::link::NIL;

/// One guest page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestPage {
    /// First spte at level 1 that maps it.
    pub sptes: u32,
    /// First shadow page whose gfn this is.
    pub shadows: u32,
}

/// One 2 MiB block of guest pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestBlock {
    /// First spte at level 2 that maps it.
    pub sptes: u32,
    /// How many shadow pages shadow a guest table inside it: while there is one, no writable large spte.
    pub tracked: u32,
}

impl Default for GuestPage {
    fn default() -> Self {
        GuestPage { sptes: NIL, shadows: NIL }
    }
}

impl Default for GuestBlock {
    fn default() -> Self {
        GuestBlock { sptes: NIL, tracked: 0 }
    }
}

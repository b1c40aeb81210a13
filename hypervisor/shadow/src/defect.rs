//! Deliberate defects, each of a kind that others have shipped: for tests that show that the tests find them.
//!
//! Where there is a model machine to find them on, `has` asks which one is switched on for the running thread.
//! Elsewhere it is false, and nothing of them is compiled.

macro_rules! defects {
    ($($(#[doc = $text:literal])* $name:ident,)*) => {
        /// What is done wrong. H and a number: the row of `docs/hazards.md` that it is taken from.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Defect { $($(#[doc = $text])* $name,)* }

        #[cfg(any(test, feature = "model"))]
        impl Defect {
            /// All of them.
            pub const ALL: &[Defect] = &[$(Defect::$name),*];

            /// What is done wrong.
            pub fn description(self) -> &'static str {
                match self { $(Defect::$name => concat!($($text),*).trim_ascii(),)* }
            }
        }
    };
}

defects! {
    /// H1: a table's role does not hold the rights of the entries above it
    RoleWithoutInheritedRights,
    /// H2: a table that fell behind is linked at a new place as it is
    UnsyncTableLinked,
    /// H3: the fill goes by what the walk read before the tables were tracked
    WalkTrusted,
    /// H3: other cores are not asked to flush before a table is looked into
    NotShutOut,
    /// H4: a shadowed table becomes writable without its unsync mark
    WritableWithoutMark,
    /// H5: a sync grants a write to a page that holds another shadowed table
    SyncGrantsWrite,
    /// H6: an operation begins with fewer frames than it can need
    TooFewReserved,
    /// H7: a zapped table's frame is free before anyone has flushed
    FreedBeforeFlush,
    /// H7: a loaded root is not counted as in use
    RootNotCounted,
    /// H9: address bits above MAXPHYADDR are accepted
    AddressBitsAccepted,
    /// H11: an entry that is no RAM reads as if it were present
    NoRamReadsPresent,
    /// H14: what a sync takes away asks for no flush
    NoFlushAfterSync,
    /// H14: a tag that changes its root keeps its translations
    TagKeptForAnotherRoot,
    /// H15: a role does not tell CR0.WP = 0 from 1
    RoleWithoutWp,
    /// H15: a page that the supervisor writes under CR0.WP = 0 stays the user's
    UserKeepsPage,
    /// H15: an spte that gains U asks for no flush, SMEP or not
    UserBitWidensOnly,
    /// H16: a device's write passes the tracker by
    DeviceWriteUnheard,
    /// H17: the links of a PAE root outlive its PDPTE registers
    StalePdpte,
    /// H18: a write does not set D
    DirtyNotSet,
    /// H19: INVLPG looks at leaf tables alone
    InvlpgLeafOnly,
    /// H21: the mark of an MMIO page holds its frame number
    FrameNumberInMark,
    /// H22: a large executable page is not split where it should be
    LargeExecutable,
    /// a prefill makes a shadowed table writable
    PrefillIgnoresTracker,
    /// a sync keeps translations whose entry has A clear
    SyncKeepsUnused,
    /// a writable large page over a shadowed table
    LargeOverTable,
    /// of several shadows of one table only the first is told of a write
    OneShadowUnsync,
    /// a table that is shadowed in two formats is taken for in sync
    TwoFormatsInSync,
    /// a root that comes back under another PCID is not synced
    PcidIgnored,
    /// a flush of one PCID leaves its other roots as they are
    OtherRootsKept,
    /// a reused descriptor is taken for the page that it was
    TrailOutlivesItsPages,
}

#[cfg(any(test, feature = "model"))]
mod switch {
    use core::cell::Cell;

    use super::Defect;

    std::thread_local! {
        static SWITCHED_ON: Cell<Option<Defect>> = const { Cell::new(None) };
    }

    /// Whether `defect` is switched on.
    #[inline]
    pub(crate) fn has(defect: Defect) -> bool {
        SWITCHED_ON.get() == Some(defect)
    }

    /// Runs `f` with `defect` switched on for this thread.
    pub fn with<R>(defect: Defect, f: impl FnOnce() -> R) -> R {
        SWITCHED_ON.set(Some(defect));
        let result = f();
        SWITCHED_ON.set(None);
        result
    }
}

#[cfg(any(test, feature = "model"))]
pub(crate) use switch::has;
#[cfg(any(test, feature = "model"))]
pub use switch::with;

/// No defect is ever switched on.
#[cfg(not(any(test, feature = "model")))]
#[inline(always)]
pub(crate) const fn has(_: Defect) -> bool {
    false
}

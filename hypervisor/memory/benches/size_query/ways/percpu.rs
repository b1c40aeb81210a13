//! Linux's `percpu_counter`: a signed difference a processor, folded into the shared count under its lock whenever it
//! reaches the batch. It can be asked cheaply (the shared count alone) or by the sum over all, under the lock.

use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};

use super::{Answer, Core, Way};

/// `percpu_counter_batch` where there are few processors.
const BATCH: i64 = 32;

/// A processor's difference; one thread writes it.
#[repr(align(128))]
struct Difference(AtomicI64);

#[repr(align(128))]
struct Count {
    count: AtomicI64,
    lock: Mutex<()>,
}

/// Asked by `percpu_counter_read`.
pub struct PerCpu {
    shared: Count,
    cpus: Box<[Difference]>,
}

/// The same, asked by `__percpu_counter_sum`.
pub struct PerCpuSum(pub PerCpu);

impl PerCpu {
    pub fn new(cpus: usize) -> Self {
        let shared = Count { count: AtomicI64::new(0), lock: Mutex::new(()) };
        Self { shared, cpus: (0..cpus).map(|_| Difference(AtomicI64::new(0))).collect() }
    }

    fn sum(&self) -> i64 {
        let _lock = self.shared.lock.lock().expect("nobody panics");
        let differences: i64 = self.cpus.iter().map(|cpu| cpu.0.load(Ordering::Relaxed)).sum();
        self.shared.count.load(Ordering::Relaxed) + differences
    }
}

impl Way for PerCpu {
    type Core<'a> = Cpu<'a>;

    fn core(&self, core: usize) -> Cpu<'_> {
        Cpu { shared: &self.shared, own: &self.cpus[core].0 }
    }

    fn query(&self) -> Answer {
        Answer::plain(self.shared.count.load(Ordering::Relaxed))
    }
}

impl Way for PerCpuSum {
    type Core<'a> = Cpu<'a>;

    fn core(&self, core: usize) -> Cpu<'_> {
        self.0.core(core)
    }

    fn query(&self) -> Answer {
        Answer::plain(self.0.sum())
    }
}

/// A processor's side.
pub struct Cpu<'a> {
    shared: &'a Count,
    own: &'a AtomicI64,
}

impl Cpu<'_> {
    /// `percpu_counter_add_batch`.
    #[inline]
    fn add(&self, pages: i64) {
        let difference = self.own.load(Ordering::Relaxed) + pages;
        if difference.abs() < BATCH {
            self.own.store(difference, Ordering::Relaxed);
        } else {
            self.fold(difference);
        }
    }

    #[cold]
    fn fold(&self, difference: i64) {
        let _lock = self.shared.lock.lock().expect("nobody panics");
        let count = self.shared.count.load(Ordering::Relaxed);
        self.shared.count.store(count + difference, Ordering::Relaxed);
        self.own.store(0, Ordering::Relaxed);
    }
}

impl Core for Cpu<'_> {
    #[inline]
    fn allocated(&mut self, _: usize) {
        self.add(1);
    }

    #[inline]
    fn freed(&mut self, _: usize) {
        self.add(-1);
    }
}

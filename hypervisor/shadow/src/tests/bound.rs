//! How long an instruction can take that needs as many tables at once as one can, in a guest that has the fewest
//! pages it may have, between others that use all that they can get.

use memory::{Counters, Gva};

use super::cache::{PARENT, PROCESS, Random, SMALLEST, four, page, processes, setup, touch};
use super::guest::FLAGS;
use crate::model::machine::READ;
use crate::model::tenants::{Policy, Setup, Tenants};
use crate::{PAGES_PER_INSTRUCTION, Paging, fills_max, pages_min};

/// Ways of an instruction, each through tables of its own at all three levels below the root.
const WAYS: u64 = (PAGES_PER_INSTRUCTION as u64 - 1) / 3;
/// Different instructions of a vCPU.
const INSTRUCTIONS: u64 = 8;
/// The tables of the ways of all instructions.
const WAY_TABLES: u64 = 0x80_0000;
/// RAM of a guest, in blocks: room for them.
const BLOCKS: u64 = 16;
/// The roots of the vCPUs, one a page.
const ROOTS: u64 = 0x5_0000;
/// Turns of a run: attempts of instructions.
const TURNS: u64 = 20_000;

/// One of the ways of an instruction.
fn way(instruction: u64, number: u64) -> Gva {
    Gva((2 + instruction * WAYS + number) << 39 | number << 30 | number << 21)
}

/// Gives each vCPU of the first guest a root of its own, with the ways of its own instructions.
fn build(tenants: &Tenants<'_>, vcpus: u64) {
    for vcpu in 0..vcpus {
        let root = ROOTS + vcpu * 0x1000;
        let machine = tenants.guests[0].machine.borrow();
        for at in [0, 8] {
            machine.poke(root + at, machine.peek(PARENT + at));
        }
        for which in 0..INSTRUCTIONS * WAYS {
            let (number, tables) = (which % WAYS, WAY_TABLES + (vcpu * INSTRUCTIONS * WAYS + which) * 0x3000);
            machine.poke(root + 8 * (2 + which), tables | FLAGS);
            machine.poke(tables + 8 * number, (tables + 0x1000) | FLAGS);
            machine.poke(tables + 0x1000 + 8 * number, (tables + 0x2000) | FLAGS);
            machine.poke(tables + 0x2000, page(which) | FLAGS);
        }
        drop(machine);
        tenants.turn_to(0, vcpu as u8);
        tenants.load(0, Paging { cr3: root, ..processes()[0] });
    }
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// One after the other, for so many turns each. With as many as an instruction has ways, each is interrupted when
    /// all its ways are there.
    Slices(u64),
    /// Anyone's.
    Random,
    /// The first vCPU's in one of so many, else one of the others'.
    FirstOneOf(u64),
}

impl Order {
    fn choose(self, turn: u64, vcpus: u64, random: &mut Random) -> usize {
        let vcpu = match self {
            Order::Slices(turns) => turn / turns % vcpus,
            Order::Random => random.below(vcpus),
            Order::FirstOneOf(turns) if turn.is_multiple_of(turns) || vcpus == 1 => 0,
            Order::FirstOneOf(_) => 1 + random.below(vcpus - 1),
        };
        vcpu as usize
    }
}

/// A vCPU on its way through instructions.
#[derive(Clone, Default)]
struct Course {
    /// Accesses of instructions of other kinds, until the next of the kind in question.
    before: u64,
    /// Which one that is.
    instruction: u64,
    /// Fills that it has taken so far.
    fills: u64,
    /// Instructions of the kind that have retired.
    retired: u64,
}

/// What a run came to.
struct Run {
    /// Most fills of one vCPU for one instruction, whether it has retired or not.
    own: u64,
    /// Most fills of all vCPUs together while no instruction retired.
    together: u64,
    /// Instructions of each vCPU that have retired.
    retired: Vec<u64>,
}

/// The vCPUs of a guest that may have no more pages than it must execute nothing but such instructions, with up to
/// `before_max` accesses of other kinds before each.
fn run(vcpus: u32, order: Order, before_max: u64) -> Run {
    let counters = Counters::new(4);
    let setup = Setup {
        blocks: BLOCKS,
        vcpus,
        pages_max: pages_min(vcpus),
        ..setup(u64::from(vcpus) * SMALLEST, Policy::Ours)
    };
    let tenants = four(&counters, setup, [0; 4]);
    build(&tenants, vcpus.into());
    let mut random = Random(41);
    let mut courses = vec![Course::default(); vcpus as usize];
    let (mut own, mut together, mut since) = (0, 0, 0);
    for turn in 0..TURNS {
        if turn % 8 == 0 {
            touch(&tenants, 1 + (turn / 8 % 3) as usize, &mut random, 100, 10);
        }
        let vcpu = order.choose(turn, vcpus.into(), &mut random);
        tenants.turn_to(0, vcpu as u8);
        let course = &mut courses[vcpu];
        if course.before > 0 {
            course.before -= 1;
            // Other leaf tables, hot and cold, in no order, and what belongs to any instruction.
            let gva = if random.below(3) == 0 {
                way(random.below(INSTRUCTIONS), random.below(WAYS))
            } else {
                Gva(PROCESS + (random.below(1 + turn % 40) << 21))
            };
            tenants.access(0, gva, READ);
            since = tenants.guests[0].fills.get();
            continue;
        }
        // The instruction starts anew after each fault.
        let before = tenants.guests[0].fills.get();
        let retires = (0..WAYS).all(|n| tenants.attempt(0, way(course.instruction, n), READ).is_some());
        let now = tenants.guests[0].fills.get();
        course.fills += now - before;
        own = own.max(course.fills);
        together = together.max(now - since);
        if retires {
            since = now;
            *course = Course {
                before: random.below(before_max + 1),
                instruction: random.below(INSTRUCTIONS),
                fills: 0,
                retired: course.retired + 1,
            };
        }
    }
    tenants.audit();
    Run { own, together, retired: courses.iter().map(|course| course.retired).collect() }
}

#[test]
fn an_instruction_retires_within_the_bound() {
    for vcpus in [1, 2, 4] {
        let bound = u64::from(fills_max(vcpus, pages_min(vcpus)));
        println!("{vcpus} vCPUs in {} pages, the bound is {bound} fills together:", pages_min(vcpus));
        // What can be told apart.
        let orders = [
            Order::Slices(1),
            Order::Random,
            Order::Slices(3),
            Order::Slices(WAYS - 1),
            Order::Slices(WAYS),
            Order::Slices(100),
            Order::FirstOneOf(4),
            Order::FirstOneOf(64),
        ];
        for order in &orders[..if vcpus == 1 { 1 } else { orders.len() }] {
            for before_max in [0, 60] {
                let Run { own, together, retired } = run(vcpus, *order, before_max);
                println!(
                    "  {order:?}, up to {before_max} accesses before: {own} of its own, {together} together; {retired:?}"
                );
                assert!(
                    together <= bound,
                    "{together} fills in which none of {vcpus} vCPUs went on: {order:?}"
                );
                // Nobody is left behind at one pace.
                let fair = !matches!(order, Order::FirstOneOf(_));
                assert!(!fair || retired.iter().all(|&retired| retired > 0), "{retired:?}");
                assert!(vcpus > 1 || own <= bound);
            }
        }
    }
}

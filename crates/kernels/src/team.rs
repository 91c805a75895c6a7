//! Helpers that stay awake between steps.
//!
//! A token takes some hundreds of steps of tens of microseconds. A thread of a pool that sleeps between two of them comes late to
//! each or never: to wake it takes as long as the step, on virtual machines longer. Helpers here look for the next step for a
//! while before they sleep, and nobody waits for one that has not come.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long a helper looks for work before it sleeps.
const AWAKE: Duration = Duration::from_micros(200);
/// Helpers at most.
const MOST: usize = 255;

/// A step that helpers may join: what they call, and with what.
#[derive(Clone, Copy)]
struct Job {
    data: *const (),
    call: unsafe fn(*const ()),
}

/// Where the step of the moment is.
struct Desk {
    /// Odd while a step may be joined; moves on with each opening and closing.
    epoch: AtomicU64,
    /// Helpers that have come, whether they found it open or not, and have not gone.
    inside: AtomicUsize,
    /// Helpers that may still join.
    room: AtomicIsize,
    job: UnsafeCell<Job>,
}

// SAFETY: `job` is written only while the desk is closed and nobody is inside, and read only by who is inside an open one.
unsafe impl Sync for Desk {}
// SAFETY: as above; what `job` points to is `Sync` and outlives the opening, by `join`.
unsafe impl Send for Desk {}

struct Helper {
    thread: Thread,
    asleep: Arc<AtomicBool>,
}

struct Team {
    helpers: Vec<Helper>,
}

static DESK: Desk = Desk {
    epoch: AtomicU64::new(0),
    inside: AtomicUsize::new(0),
    room: AtomicIsize::new(0),
    job: UnsafeCell::new(Job { data: std::ptr::null(), call: nothing }),
};
static TEAM: Mutex<Team> = Mutex::new(Team { helpers: Vec::new() });

unsafe fn nothing(_: *const ()) {}

/// Runs `work` on this thread and on up to `threads - 1` helpers at once, until it returns on all that began it. False, and nothing
/// is run, if the helpers are busy with something else.
pub(crate) fn join<W: Fn() + Sync>(threads: usize, work: &W) -> bool {
    unsafe fn call<W: Fn() + Sync>(data: *const ()) {
        // SAFETY: `data` is the `work` of the call of `join` that is open.
        unsafe { (*data.cast::<W>())() }
    }
    let mut team = match TEAM.try_lock() {
        Ok(team) => team,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return false,
    };
    let wanted = (threads - 1).min(MOST);
    while team.helpers.len() < wanted {
        match helper(team.helpers.len()) {
            Some(helper) => team.helpers.push(helper),
            None => return false,
        }
    }
    // SAFETY: the team is locked, so the desk is closed; the last to open it waited until nobody was inside who had found it
    // open, and who comes now does not look at the job.
    unsafe { *DESK.job.get() = Job { data: std::ptr::from_ref(work).cast(), call: call::<W> } };
    DESK.room.store(wanted as isize, Ordering::Relaxed);
    FAILED.store(false, Ordering::Relaxed);
    let open = DESK.epoch.load(Ordering::Relaxed) + 1;
    DESK.epoch.store(open, Ordering::SeqCst);
    // Closes the desk, also when `work` panics, and waits for those who are inside: they use what is on this stack.
    struct Close(u64);
    impl Drop for Close {
        fn drop(&mut self) {
            DESK.epoch.store(self.0 + 1, Ordering::SeqCst);
            let mut turns = 0u32;
            while DESK.inside.load(Ordering::SeqCst) != 0 {
                turns += 1;
                if turns.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
            }
        }
    }
    let close = Close(open);
    for helper in &team.helpers[..wanted] {
        if helper.asleep.swap(false, Ordering::SeqCst) {
            helper.thread.unpark();
        }
    }
    work();
    drop(close);
    if FAILED.swap(false, Ordering::SeqCst) {
        panic!("a helper panicked");
    }
    true
}

/// A helper panicked in the step of the moment.
static FAILED: AtomicBool = AtomicBool::new(false);

/// A thread that helps until the process ends.
fn helper(number: usize) -> Option<Helper> {
    let asleep = Arc::new(AtomicBool::new(false));
    let own = asleep.clone();
    let thread = std::thread::Builder::new().name(format!("helper {number}"));
    let handle = thread.spawn(move || help(&own)).ok()?;
    Some(Helper { thread: handle.thread().clone(), asleep })
}

fn help(asleep: &AtomicBool) {
    let mut seen = 0;
    loop {
        let start = Instant::now();
        let epoch = loop {
            let epoch = DESK.epoch.load(Ordering::SeqCst);
            if epoch % 2 == 1 && epoch != seen {
                break epoch;
            }
            for _ in 0..32 {
                std::hint::spin_loop();
            }
            if start.elapsed() > AWAKE {
                asleep.store(true, Ordering::SeqCst);
                // What was opened between the look and the word is seen now, or else whoever opened it sees the word.
                let epoch = DESK.epoch.load(Ordering::SeqCst);
                if epoch % 2 == 1 && epoch != seen {
                    asleep.store(false, Ordering::SeqCst);
                    break epoch;
                }
                while asleep.load(Ordering::SeqCst) {
                    std::thread::park();
                }
                // Whoever woke this one did it for a step; there may be another by now.
                let epoch = DESK.epoch.load(Ordering::SeqCst);
                if epoch % 2 == 1 && epoch != seen {
                    break epoch;
                }
                break 0;
            }
        };
        if epoch == 0 {
            continue;
        }
        DESK.inside.fetch_add(1, Ordering::SeqCst);
        // Either this sees that the desk is closed, or who closes it sees that someone is inside.
        if DESK.epoch.load(Ordering::SeqCst) == epoch && DESK.room.fetch_sub(1, Ordering::SeqCst) > 0 {
            // SAFETY: the desk is open, and stays as it is until this one is gone.
            let job = unsafe { *DESK.job.get() };
            // SAFETY: `data` belongs to `call`, by `join`.
            let done = std::panic::catch_unwind(|| unsafe { (job.call)(job.data) });
            if done.is_err() {
                FAILED.store(true, Ordering::SeqCst);
            }
        }
        seen = epoch;
        DESK.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tests share the team: whoever finds it busy tries again.
    fn joined<W: Fn() + Sync>(threads: usize, work: &W) {
        while !join(threads, work) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn every_task_is_done_once_whoever_comes() {
        for threads in [1, 2, 3, 5] {
            for count in [1usize, 2, 7, 100] {
                for _ in 0..50 {
                    let next = AtomicUsize::new(0);
                    let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                    joined(threads, &|| {
                        loop {
                            let index = next.fetch_add(1, Ordering::Relaxed);
                            let Some(task) = done.get(index) else { break };
                            task.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                    assert!(done.iter().all(|task| task.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn no_more_come_than_were_asked_for() {
        joined(5, &|| ());
        for _ in 0..200 {
            let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
            joined(2, &|| {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_micros(20));
                now.fetch_sub(1, Ordering::SeqCst);
            });
            assert!(most.load(Ordering::SeqCst) <= 2);
        }
    }

    #[test]
    fn helpers_come_again_after_they_slept() {
        let mut came = 0;
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(2));
            let inside = AtomicUsize::new(0);
            joined(2, &|| {
                inside.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(20));
            });
            came += usize::from(inside.load(Ordering::SeqCst) == 2);
        }
        assert!(came > 0, "a sleeping helper never came");
    }

    #[test]
    fn a_panic_on_this_thread_leaves_the_team_whole() {
        let failed = std::panic::catch_unwind(|| {
            while !join(2, &|| panic!("as asked")) {
                std::thread::yield_now();
            }
        });
        assert!(failed.is_err());
        let count = AtomicUsize::new(0);
        joined(2, &|| {
            count.fetch_add(1, Ordering::SeqCst);
        });
        assert!(count.load(Ordering::SeqCst) >= 1);
    }
}

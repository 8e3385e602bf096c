//! Work on the threads of the OpenMP that torch brings: they are awake between the calls of a step, and threads of our
//! own would fight with them for the cores.

use std::ffi::{c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// `GOMP_parallel` of GCC's and of LLVM's OpenMP: each thread of a team calls the function, all return at its end.
type Fork = unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

static FORK: AtomicUsize = AtomicUsize::new(0);
static THREADS: AtomicUsize = AtomicUsize::new(1);

/// Use `threads` threads of the OpenMP whose `GOMP_parallel` is at this address; 0 = there is none, so work alone.
pub fn set_threads(threads: usize, fork: usize) {
    THREADS.store(threads, Relaxed);
    FORK.store(fork, Relaxed);
}

struct Call<'a> {
    job: &'a (dyn Fn(usize) + Sync),
    parts: usize,
    next: AtomicUsize,
}

impl Call<'_> {
    fn work(&self) {
        loop {
            let part = self.next.fetch_add(1, Relaxed);
            if part >= self.parts {
                return;
            }
            (self.job)(part);
        }
    }
}

unsafe extern "C" fn work(call: *mut c_void) {
    (*call.cast::<Call>()).work();
}

const ALONE_BYTES: usize = 128 << 10; // to read: some microseconds, not worth waiting for others

/// Call `job` with each of 0..parts, which read so many bytes together; whoever is free takes the next.
pub fn run(parts: usize, bytes: usize, job: &(dyn Fn(usize) + Sync)) {
    let call = Call { job, parts, next: AtomicUsize::new(0) };
    let (threads, fork) = (THREADS.load(Relaxed).min(parts), FORK.load(Relaxed));
    if threads <= 1 || fork == 0 || bytes < ALONE_BYTES {
        return call.work();
    }
    let fork: Fork = unsafe { std::mem::transmute(fork) };
    unsafe { fork(work, std::ptr::from_ref(&call).cast_mut().cast(), threads as c_uint, 0) };
}

//! What a program sets for itself at its start, so that steps are fast. A library that uses these kernels need do none of it.

/// Keeps candle from having threads of its own beside those of the pool: it would start one a core at its first sum of large
/// tensors, however few threads were asked for, and each waits for the next sum by spinning. A setting of the environment
/// (`CANDLE_NUM_THREADS`) that is there already is left as it is.
///
/// Candle reads its setting from the environment alone, which must not change while another thread may read it: so this is for
/// the first line of a program, and does nothing where the process has other threads, or where their number is not known
/// (elsewhere than on Linux).
pub fn keep_candle_on_one_thread() {
    const KEY: &str = "CANDLE_NUM_THREADS";
    let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads == 1 && std::env::var_os(KEY).is_none() {
        // SAFETY: there is no other thread that could read the environment meanwhile.
        unsafe { std::env::set_var(KEY, "1") };
    }
}

/// From here on mimalloc keeps memory that was freed, for a program whose global allocator it is and whose steps all need as
/// much as the one before: given back to the system, it would come again as pages to be cleared. `MIMALLOC_PURGE_DELAY` in the environment
/// goes before this.
#[cfg(feature = "mimalloc")]
pub fn keep_freed_memory() {
    /// `mi_option_purge_delay`: milliseconds after which memory that is not used is given back; below 0 it never is.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: an option may be set at any time from any thread; the number is that of mimalloc's second and third version.
    unsafe { libmimalloc_sys::mi_option_set_default(PURGE_DELAY, -1) };
}

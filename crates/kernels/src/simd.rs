//! Which instruction set the kernels use, found once at run time.

use std::sync::OnceLock;

/// The instruction sets that kernels are compiled for, from the least to the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the compilation target guarantees; no fused multiply-add is assumed.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL, and what of VNNI it has.
    Avx512,
    /// And BF16: dot products of pairs of bf16.
    Avx512Bf16,
}

impl Level {
    /// All of them.
    pub const ALL: [Level; 4] = [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16];

    /// The name that `SENMON_SIMD` takes.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512_bf16",
        }
    }

    /// The most that this machine can run, without regard to `SENMON_SIMD`.
    pub fn detected() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 {
                let bf16 = is_x86_feature_detected!("avx512bf16");
                return if bf16 { Level::Avx512Bf16 } else { Level::Avx512 };
            }
            if avx2 {
                return Level::Avx2;
            }
        }
        Level::Portable
    }

    /// The fastest that this machine can run: Intel's processors since Sapphire Rapids have dot products of bf16 that take twice as
    /// long as the two multiply-adds of f32 that do the same (Emerald Rapids, measured: 85 of 174 GFLOP/s a thread).
    ///
    /// By the processor's name rather than by its speed, so that the bits of results are those of the last time.
    pub fn fastest() -> Level {
        match Level::detected() {
            Level::Avx512Bf16 if has_slow_bf16_dots() => Level::Avx512,
            level => level,
        }
    }

    /// The level in force: the [fastest](Self::fastest), or what `SENMON_SIMD` names if the machine has it. An unknown
    /// value, or one above the machine's, changes nothing (the binary refuses an unknown one at its start).
    pub fn current() -> Level {
        static LEVEL: OnceLock<Level> = OnceLock::new();
        *LEVEL.get_or_init(|| {
            let asked = std::env::var("SENMON_SIMD").ok().and_then(|name| Level::from_name(&name));
            asked.filter(|level| *level <= Level::detected()).unwrap_or_else(Level::fastest)
        })
    }

    /// The level of that name.
    pub fn from_name(name: &str) -> Option<Level> {
        Level::ALL.into_iter().find(|level| level.name() == name)
    }

    /// Every level that this machine can run, for tests that hold the paths together.
    pub fn available() -> Vec<Level> {
        let most = Level::detected();
        Level::ALL.into_iter().filter(|level| *level <= most).collect()
    }

    /// Has dot products of pairs of bf16 into f32.
    pub fn has_bf16_dots(self) -> bool {
        self == Level::Avx512Bf16
    }

    /// Has dot products of quads of 8 bits into 32 (AVX-512 VNNI), on this machine.
    pub fn has_int8_dots(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self >= Level::Avx512 {
            return is_x86_feature_detected!("avx512vnni");
        }
        false
    }
}

/// Whether the processor is one of Intel's, but not of the family of Cooper Lake, the first that had such dot products.
fn has_slow_bf16_dots() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let (name, version) = (std::arch::x86_64::__cpuid(0), std::arch::x86_64::__cpuid(1).eax);
        let vendor = [name.ebx, name.edx, name.ecx].map(u32::to_le_bytes);
        let (family, model) = (version >> 8 & 15, version >> 4 & 15 | version >> 12 & 0xf0);
        vendor.as_flattened() == b"GenuineIntel" && (family, model) != (6, 0x55)
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Compiles one plain body for every [`Level`]: `by_level! { pub fn name(args) -> Ret { body } }` makes
/// `name(level, args)`, which runs `body` with that level's instructions enabled. In the body, the constant
/// `FMA: bool` says whether `mul_add` is one instruction; without it `a * b + c` is far faster. The body must be
/// written so that the compiler can vectorise it (arrays of lanes, `chunks_exact`): sums are never reordered.
#[macro_export]
macro_rules! by_level {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name(level: $crate::simd::Level, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(dead_code)]
            fn body<const FMA: bool>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }
                let level = level.min($crate::simd::Level::detected());
                if level >= $crate::simd::Level::Avx512 {
                    // SAFETY: the machine has these features, as just checked.
                    return unsafe { avx512($($arg),*) };
                }
                if level >= $crate::simd::Level::Avx2 {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            let _ = level;
            body::<false>($($arg),*)
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_is_one_that_the_machine_has() {
        let levels = Level::available();
        assert!(levels.is_sorted() && levels.last() == Some(&Level::detected()));
        let fastest = Level::fastest();
        let lowered = Level::detected() == Level::Avx512Bf16 && fastest == Level::Avx512;
        assert!(fastest == Level::detected() || lowered, "{fastest:?}");
        for level in Level::ALL {
            assert_eq!(Level::from_name(level.name()), Some(level));
            assert!(!level.has_int8_dots() || level >= Level::Avx512);
        }
        assert_eq!(Level::from_name("avx"), None);
    }
}

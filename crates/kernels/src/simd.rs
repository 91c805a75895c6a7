//! Which instruction set the kernels use, found once at run time.

use std::sync::OnceLock;

/// The instruction sets that kernels are compiled for, from the least to the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the compilation target guarantees; no fused multiply-add is assumed.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Level {
    /// The name that `SENMON_SIMD` takes.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        }
    }

    /// What this machine can do, without regard to `SENMON_SIMD`.
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
                return Level::Avx512;
            }
            if avx2 {
                return Level::Avx2;
            }
        }
        Level::Portable
    }

    /// The level in force: what the machine has, lowered by `SENMON_SIMD=avx512|avx2|portable`. An unknown
    /// value, or one above the machine's, changes nothing (the binary refuses an unknown one at its start).
    pub fn current() -> Level {
        static LEVEL: OnceLock<Level> = OnceLock::new();
        *LEVEL.get_or_init(|| {
            let asked = std::env::var("SENMON_SIMD").ok().and_then(|name| Level::from_name(&name));
            asked.map_or(Level::detected(), |level| level.min(Level::detected()))
        })
    }

    /// The level of that name.
    pub fn from_name(name: &str) -> Option<Level> {
        [Level::Portable, Level::Avx2, Level::Avx512].into_iter().find(|level| level.name() == name)
    }

    /// Every level that this machine can run, for tests that hold the paths together.
    pub fn available() -> Vec<Level> {
        let best = Level::detected();
        [Level::Portable, Level::Avx2, Level::Avx512].into_iter().filter(|level| *level <= best).collect()
    }
}

/// Dot products that some machines of a level have and others do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dots {
    /// Pairs of bf16 into f32 (AVX-512 BF16).
    pub bf16: bool,
    /// Quads of 8 bits into 32 (AVX-512 VNNI).
    pub int8: bool,
}

impl Dots {
    /// Those that this machine has, if `level` lets it use them.
    pub fn of(level: Level) -> Self {
        #[cfg(target_arch = "x86_64")]
        if level == Level::Avx512 {
            return Self {
                bf16: is_x86_feature_detected!("avx512bf16"),
                int8: is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("f16c"),
            };
        }
        let _ = level;
        Self { bf16: false, int8: false }
    }
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
                match level {
                    $crate::simd::Level::Avx512 if $crate::simd::Level::detected() >= $crate::simd::Level::Avx512 =>
                        // SAFETY: the machine has these features, as just checked.
                        return unsafe { avx512($($arg),*) },
                    $crate::simd::Level::Avx2 | $crate::simd::Level::Avx512
                        if $crate::simd::Level::detected() >= $crate::simd::Level::Avx2 =>
                        // SAFETY: as above.
                        return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            let _ = level;
            body::<false>($($arg),*)
        }
    };
}

//! The inner loops over vectors of whatever width there is: `with_best!` compiles a loop for AVX-512, for AVX2 and for any
//! machine, and takes the best at run time.

/// A number as it lies in memory: fp32, the bits of a bfloat16, or an integer with a scale outside. Its loads are safe
/// where the machine has the instructions and the addresses have the numbers.
pub trait Element: Copy + Send + Sync + 'static {
    fn get(self) -> f32;
    fn put(x: f32) -> Self;
    /// V::WIDTH numbers from an address that has them.
    unsafe fn load<V: Vector>(from: *const Self) -> V;
    /// The 32 numbers from an address on as bfloat16, for the types that lose nothing by it.
    #[cfg(target_arch = "x86_64")]
    const IS_BF16: bool = false;
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_bf16(_: *const Self) -> std::arch::x86_64::__m512bh {
        unreachable!("fp32 is wider than bfloat16")
    }
}

impl Element for f32 {
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
    #[inline(always)]
    fn put(x: f32) -> Self {
        x
    }
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        V::from_f32(from)
    }
}

impl Element for u16 {
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits((self as u32) << 16)
    }
    #[inline(always)]
    fn put(x: f32) -> Self {
        let bits = x.to_bits();
        (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16 // to nearest, ties to even
    }
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        V::from_bf16(from)
    }
    #[cfg(target_arch = "x86_64")]
    const IS_BF16: bool = true;
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_bf16(from: *const Self) -> std::arch::x86_64::__m512bh {
        std::mem::transmute(std::arch::x86_64::_mm512_loadu_si512(from.cast()))
    }
}

impl Element for i8 {
    #[inline(always)]
    fn get(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    fn put(_: f32) -> Self {
        unreachable!("integers are weights, which are only read")
    }
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        V::from_i8(from)
    }
    #[cfg(target_arch = "x86_64")]
    const IS_BF16: bool = true;
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_bf16(from: *const Self) -> std::arch::x86_64::__m512bh {
        use std::arch::x86_64::*;
        let half = |at| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.add(at).cast())));
        _mm512_cvtne2ps_pbh(half(16), half(0))
    }
}

/// Some fp32 numbers at once.
///
/// Its functions are safe to call where the machine has the instructions and the addresses have WIDTH numbers.
pub trait Vector: Copy {
    const WIDTH: usize;
    unsafe fn all(x: f32) -> Self;
    unsafe fn from_f32(from: *const f32) -> Self;
    unsafe fn from_bf16(from: *const u16) -> Self;
    unsafe fn from_i8(from: *const i8) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// self * a + b
    unsafe fn multiply_add(self, a: Self, b: Self) -> Self;
    unsafe fn sum(self) -> f32;
}

/// For any machine; the compiler sees that four numbers fit its vectors.
#[derive(Clone, Copy)]
pub struct Portable([f32; 4]);

impl Vector for Portable {
    const WIDTH: usize = 4;
    #[inline(always)]
    unsafe fn all(x: f32) -> Self {
        Portable([x; 4])
    }
    #[inline(always)]
    unsafe fn from_f32(from: *const f32) -> Self {
        Portable(std::array::from_fn(|i| *from.add(i)))
    }
    #[inline(always)]
    unsafe fn from_bf16(from: *const u16) -> Self {
        Portable(std::array::from_fn(|i| (*from.add(i)).get()))
    }
    #[inline(always)]
    unsafe fn from_i8(from: *const i8) -> Self {
        Portable(std::array::from_fn(|i| *from.add(i) as f32))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        to.cast::<[f32; 4]>().write_unaligned(self.0);
    }
    #[inline(always)]
    unsafe fn multiply_add(self, a: Self, b: Self) -> Self {
        Portable(std::array::from_fn(|i| self.0[i] * a.0[i] + b.0[i]))
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        self.0.iter().sum()
    }
}

#[cfg(target_arch = "x86_64")]
pub mod x86 {
    use super::Vector;
    use std::arch::x86_64::*;

    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    impl Vector for Avx512 {
        const WIDTH: usize = 16;
        #[inline(always)]
        unsafe fn all(x: f32) -> Self {
            Avx512(_mm512_set1_ps(x))
        }
        #[inline(always)]
        unsafe fn from_f32(from: *const f32) -> Self {
            Avx512(_mm512_loadu_ps(from))
        }
        #[inline(always)]
        unsafe fn from_bf16(from: *const u16) -> Self {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
        #[inline(always)]
        unsafe fn from_i8(from: *const i8) -> Self {
            Avx512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))))
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            _mm512_storeu_ps(to, self.0);
        }
        #[inline(always)]
        unsafe fn multiply_add(self, a: Self, b: Self) -> Self {
            Avx512(_mm512_fmadd_ps(self.0, a.0, b.0))
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            _mm512_reduce_add_ps(self.0)
        }
    }

    #[derive(Clone, Copy)]
    pub struct Avx2(__m256);

    impl Vector for Avx2 {
        const WIDTH: usize = 8;
        #[inline(always)]
        unsafe fn all(x: f32) -> Self {
            Avx2(_mm256_set1_ps(x))
        }
        #[inline(always)]
        unsafe fn from_f32(from: *const f32) -> Self {
            Avx2(_mm256_loadu_ps(from))
        }
        #[inline(always)]
        unsafe fn from_bf16(from: *const u16) -> Self {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            Avx2(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
        #[inline(always)]
        unsafe fn from_i8(from: *const i8) -> Self {
            Avx2(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))))
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            _mm256_storeu_ps(to, self.0);
        }
        #[inline(always)]
        unsafe fn multiply_add(self, a: Self, b: Self) -> Self {
            Avx2(_mm256_fmadd_ps(self.0, a.0, b.0))
        }
        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            let mut lanes = [0f32; 8];
            self.store(lanes.as_mut_ptr());
            lanes.iter().sum()
        }
    }
}

/// acc[i] += a * w[i]
#[inline(always)]
pub fn add_scaled<W: Element, V: Vector>(acc: &mut [f32], a: f32, w: &[W]) {
    let whole = acc.len().min(w.len()) / V::WIDTH * V::WIDTH;
    for at in (0..whole).step_by(V::WIDTH) {
        unsafe {
            let to = acc.as_mut_ptr().add(at);
            W::load::<V>(w.as_ptr().add(at)).multiply_add(V::all(a), V::from_f32(to)).store(to);
        }
    }
    for (acc, w) in acc[whole..].iter_mut().zip(&w[whole..]) {
        *acc += a * w.get();
    }
}

/// How far ahead of the loop weights are asked for, in bytes: the machine's own prefetching stops at each page.
const AHEAD: usize = 2048;

/// Ask for an address, which need not be valid.
#[inline(always)]
pub fn prefetch(from: *const u8) {
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(from.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = from;
}

/// Dot products of a row of weights with B rows of activations, all `k` long and one after the other; U sums go side by
/// side, so that none waits for the one before.
#[inline(always)]
pub fn dots<W: Element, V: Vector, const U: usize, const B: usize>(w: &[W], x: &[f32], k: usize) -> [f32; B] {
    assert!(w.len() >= k && x.len() >= B * k);
    let mut acc = [[unsafe { V::all(0.0) }; B]; U];
    let step = U * V::WIDTH;
    let whole = k / step * step;
    for at in (0..whole).step_by(step) {
        unsafe {
            let w = w.as_ptr().add(at);
            for line in (0..step * size_of::<W>()).step_by(64) {
                prefetch(w.cast::<u8>().wrapping_add(AHEAD + line));
            }
            for u in 0..U {
                let wide = W::load::<V>(w.add(u * V::WIDTH));
                for b in 0..B {
                    let x = V::from_f32(x.as_ptr().add(b * k + at + u * V::WIDTH));
                    acc[u][b] = wide.multiply_add(x, acc[u][b]);
                }
            }
        }
    }
    std::array::from_fn(|b| {
        let rest: f32 = (whole..k).map(|i| w[i].get() * x[b * k + i]).sum();
        let mut sum = acc[0][b];
        for acc in &acc[1..] {
            sum = unsafe { acc[b].multiply_add(V::all(1.0), sum) };
        }
        unsafe { sum.sum() + rest }
    })
}

/// As `dots`, of weights and activations that are bfloat16: the machine multiplies pairs of them and adds up in fp32.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn dots_bf16<W: Element, const U: usize, const B: usize>(
    w: &[W],
    x: &[u16],
    k: usize,
) -> [f32; B] {
    use std::arch::x86_64::*;
    const WIDTH: usize = 32;
    assert!(w.len() >= k && x.len() >= B * k && k.is_multiple_of(U * WIDTH));
    let mut acc = [[_mm512_setzero_ps(); B]; U];
    for at in (0..k).step_by(U * WIDTH) {
        let w = w.as_ptr().add(at);
        for line in (0..U * WIDTH * size_of::<W>()).step_by(64) {
            prefetch(w.cast::<u8>().wrapping_add(AHEAD + line));
        }
        for u in 0..U {
            let wide = W::load_bf16(w.add(u * WIDTH));
            for b in 0..B {
                let x = u16::load_bf16(x.as_ptr().add(b * k + at + u * WIDTH));
                acc[u][b] = _mm512_dpbf16_ps(acc[u][b], wide, x);
            }
        }
    }
    std::array::from_fn(|b| {
        let sum = acc[1..].iter().fold(acc[0][b], |sum, acc| _mm512_add_ps(sum, acc[b]));
        _mm512_reduce_add_ps(sum)
    })
}

/// Name a function that is `$body`, a generic inline function with the vector as its last type, compiled for the best
/// instructions that this machine has.
macro_rules! with_best {
    (fn $name:ident<$t:ident: Element $(; const $c:ident: usize)?>($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        #[allow(clippy::too_many_arguments)]
        fn $name<$t: Element $(, const $c: usize)?>($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                use crate::lanes::x86::{Avx2, Avx512};
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                unsafe fn avx512<$t: Element $(, const $c: usize)?>($($arg: $ty),*) {
                    $body::<$t, Avx512 $(, $c)?>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                unsafe fn avx2<$t: Element $(, const $c: usize)?>($($arg: $ty),*) {
                    $body::<$t, Avx2 $(, $c)?>($($arg),*)
                }
                let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
                if has_avx2
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    return unsafe { avx512::<$t $(, $c)?>($($arg),*) };
                }
                if has_avx2 {
                    return unsafe { avx2::<$t $(, $c)?>($($arg),*) };
                }
            }
            $body::<$t, crate::lanes::Portable $(, $c)?>($($arg),*)
        }
    };
}
pub(crate) use with_best;

//! Products of bfloat16 on the tiles of newer Intel CPUs (AMX): for 3 to 16 rows of activations a tile product takes no
//! longer than reading its weights from memory, where sixteen dot products would.
//!
//! The compiler has no stable names for these instructions, hence the assembly. A tile is 16 rows of 64 bytes: here 16
//! rows of 32 weights as they lie in memory, times 32 activations of up to 16 rows in pairs (`pack`), gives (16, rows) sums.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _mm512_storeu_ps};
use std::sync::OnceLock;

use crate::lanes::Element;

pub const TILE_ROWS: usize = 16;
pub const TILE_K: usize = 32;
pub const STEP: usize = 2 * TILE_ROWS; // rows of weights at a time

/// Whether the machine has tiles of bfloat16 and the system lets this process use them.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        let edx = __cpuid_count(7, 0).edx;
        let has_tiles = edx & (1 << 22) != 0 && edx & (1 << 24) != 0; // AMX-BF16, AMX-TILE
        has_tiles && is_x86_feature_detected!("avx512bf16") && permitted()
    })
}

/// Linux gives a process its tiles when it asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    let mut result: isize = 158; // the number of arch_prctl
    unsafe {
        asm!("syscall", inlateout("rax") result, in("rdi") 0x1023, in("rsi") 18, out("rcx") _, out("r11") _);
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// B rows of k activations -> tiles (k / 32, 16 pairs, B, 2).
pub fn pack(x: &[f32], rows: usize, k: usize) -> Vec<u16> {
    let mut packed = vec![0; rows * k];
    for (b, row) in x.chunks_exact(k).enumerate() {
        for (at, &x) in row.iter().enumerate() {
            packed[(at / 2 * rows + b) * 2 + at % 2] = <u16 as Element>::put(x);
        }
    }
    packed
}

#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

#[repr(align(64))]
struct Aligned<T>(T);

/// Sums of n = STEP * i rows of weights with `pack`ed activations, handed to `write` as (first row of weights, (STEP,
/// rows) sums).
///
/// # Safety
/// `available()`, and k is a multiple of TILE_K, rows at most TILE_ROWS.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub unsafe fn products<W: Element>(
    w: &[W],
    packed: &[u16],
    rows: usize,
    k: usize,
    mut write: impl FnMut(usize, &[f32]),
) {
    assert!(
        k.is_multiple_of(TILE_K)
            && rows <= TILE_ROWS
            && w.len().is_multiple_of(STEP * k)
            && packed.len() == rows * k
    );
    let mut config =
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let sums_bytes = 4 * rows;
    for (tile, bytes) in [sums_bytes, sums_bytes, 64, 64, sums_bytes].into_iter().enumerate() {
        (config.row_bytes[tile], config.rows[tile]) = (bytes as u16, TILE_ROWS as u8);
    }
    // others in this thread (oneDNN) expect to find the tiles as they configured them
    let mut before = std::mem::MaybeUninit::<Config>::uninit();
    asm!("sttilecfg [{}]", in(reg) before.as_mut_ptr());
    asm!("ldtilecfg [{}]", in(reg) &config);
    let mut wide = Aligned([[0u16; TILE_K]; STEP]); // of weights that are no bfloat16 in memory
    let mut sums = Aligned([0f32; STEP * TILE_ROWS]);
    let is_wide = size_of::<W>() != 2;
    for (i, group) in w.chunks_exact(STEP * k).enumerate() {
        asm!("tilezero tmm0", "tilezero tmm1", out("tmm0") _, out("tmm1") _);
        for at in (0..k).step_by(TILE_K) {
            let (a, stride) = if is_wide {
                for (r, wide) in wide.0.iter_mut().enumerate() {
                    let bf16 = W::load_bf16(group.as_ptr().add(r * k + at));
                    _mm512_storeu_ps(wide.as_mut_ptr().cast(), std::mem::transmute(bf16));
                }
                (wide.0.as_ptr().cast::<u8>(), 2 * TILE_K)
            } else {
                (group.as_ptr().add(at).cast::<u8>(), 2 * k)
            };
            asm!(
                "tileloadd tmm4, [{x} + {bytes}*1]",
                "tileloadd tmm2, [{a} + {stride}*1]",
                "tdpbf16ps tmm0, tmm2, tmm4",
                "tileloadd tmm3, [{b} + {stride}*1]",
                "tdpbf16ps tmm1, tmm3, tmm4",
                x = in(reg) packed.as_ptr().add(at * rows),
                bytes = in(reg) sums_bytes,
                a = in(reg) a,
                b = in(reg) a.add(TILE_ROWS * stride),
                stride = in(reg) stride,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _,
            );
        }
        asm!(
            "tilestored [{to} + {bytes}*1], tmm0",
            "tilestored [{below} + {bytes}*1], tmm1",
            to = in(reg) sums.0.as_mut_ptr(),
            below = in(reg) sums.0.as_mut_ptr().add(TILE_ROWS * rows),
            bytes = in(reg) sums_bytes,
        );
        write(i * STEP, &sums.0[..STEP * rows]);
    }
    if (*before.as_ptr()).palette == 0 {
        asm!("tilerelease");
    } else {
        asm!("ldtilecfg [{}]", in(reg) before.as_ptr());
    }
}

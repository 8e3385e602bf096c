//! y = f(x W^T) for a few rows of activations.

#[cfg(target_arch = "x86_64")]
use crate::amx;
#[cfg(target_arch = "x86_64")]
use crate::lanes::dots_bf16;
use crate::lanes::{dots, with_best, Element, Vector};
use crate::parallel;

const MAX_ROWS: usize = 8; // of activations whose sums fit the registers
const PART_BYTES: usize = 64 << 10; // of weights: some microseconds' work

/// A weight matrix, (n, k) row by row, and for integers the (n,) scales of its rows.
#[derive(Clone, Copy)]
pub struct Part<'a, W> {
    pub weights: &'a [W],
    pub scales: Option<&'a [f32]>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Then {
    Store,
    SquaredRelu,
    Add, // to what is in y
}

/// The activations (rows, k) in the form that the machine multiplies best.
enum Activations {
    Floats(Vec<f32>),
    // rounded to bfloat16, as torch does
    #[cfg(target_arch = "x86_64")]
    Pairs(Vec<u16>),
    #[cfg(target_arch = "x86_64")]
    Tiles(Vec<Vec<u16>>), // of TILE_ROWS rows each
}

impl Activations {
    fn new<W: Element>(x: &[f32], k: usize, norm: bool) -> Self {
        let mut x = x.to_vec();
        if norm {
            for row in x.chunks_exact_mut(k) {
                let scale = inverse_rms(row);
                row.iter_mut().for_each(|x| *x *= scale);
            }
        }
        #[cfg(target_arch = "x86_64")]
        if W::IS_BF16 && k.is_multiple_of(64) && is_x86_feature_detected!("avx512bf16") {
            if x.len() > 2 * k && amx::available() {
                let tiles = x.chunks(amx::TILE_ROWS * k).map(|x| amx::pack(x, x.len() / k, k));
                return Activations::Tiles(tiles.collect());
            }
            return Activations::Pairs(x.iter().map(|&x| <u16 as Element>::put(x)).collect());
        }
        Activations::Floats(x)
    }
}

/// Some columns of y (rows, width): the weights behind them, and where the first one of the first row is.
struct Block<'a, W> {
    weights: &'a [W],
    scales: Option<&'a [f32]>,
    k: usize,
    y: *mut f32,
    width: usize,
    then: Then,
}

/// Parts write to different columns.
unsafe impl<W: Sync> Sync for Block<'_, W> {}

impl<W> Block<'_, W> {
    /// Column `at` of the row `b` of y from its sum.
    #[inline(always)]
    fn write(&self, b: usize, at: usize, sum: f32) {
        let y = unsafe { &mut *self.y.add(b * self.width + at) };
        let sum = sum * self.scales.map_or(1.0, |s| s[at]);
        *y = match self.then {
            Then::Store => sum,
            Then::SquaredRelu => sum.max(0.0) * sum.max(0.0),
            Then::Add => *y + sum,
        };
    }
}

/// y (rows, sum of n) = f(x (rows, k) times each part's weights), side by side.
///
/// With `norm`, x is divided by the root of its mean square first.
pub fn linear<W: Element>(x: &[f32], rows: usize, parts: &[Part<W>], y: &mut [f32], norm: bool, then: Then) {
    let k = x.len() / rows;
    let width = y.len() / rows;
    let step = (PART_BYTES / (k * size_of::<W>())).clamp(32, 512) & !31;
    let mut blocks = Vec::new();
    let mut column = 0;
    for part in parts {
        let n = part.weights.len() / k;
        for at in (0..n).step_by(step) {
            let range = at..n.min(at + step);
            blocks.push(Block {
                weights: &part.weights[range.start * k..range.end * k],
                scales: part.scales.map(|s| &s[range]),
                k,
                y: unsafe { y.as_mut_ptr().add(column + at) },
                width,
                then,
            });
        }
        column += n;
    }
    assert_eq!(column, width, "the parts do not fill y");
    let x = Activations::new::<W>(x, k, norm);
    parallel::run(blocks.len(), width * k * size_of::<W>(), &|i| multiply(&blocks[i], &x));
}

pub fn inverse_rms(row: &[f32]) -> f32 {
    let mean = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
    1.0 / (mean + f32::EPSILON).sqrt()
}

fn multiply<W: Element>(block: &Block<W>, x: &Activations) {
    match x {
        Activations::Floats(x) => by_rows(x, block.k, |first, x| floats(block, first, x)),
        #[cfg(target_arch = "x86_64")]
        Activations::Pairs(x) => by_rows(x, block.k, |first, x| unsafe { pairs(block, first, x) }),
        #[cfg(target_arch = "x86_64")]
        Activations::Tiles(tiles) => {
            for (i, packed) in tiles.iter().enumerate() {
                unsafe { tile(block, i * amx::TILE_ROWS, packed) };
            }
        }
    }
}

fn by_rows<T>(x: &[T], k: usize, f: impl Fn(usize, &[T])) {
    for (i, x) in x.chunks(MAX_ROWS * k).enumerate() {
        f(i * MAX_ROWS, x);
    }
}

/// Call `$f` with U and B, B being the rows of activations; few of them need more sums side by side.
macro_rules! with_rows {
    ($rows:expr, $f:ident) => {
        match $rows {
            1 => $f!(2, 1),
            2 => $f!(2, 2),
            3 => $f!(1, 3),
            4 => $f!(1, 4),
            5 => $f!(1, 5),
            6 => $f!(1, 6),
            7 => $f!(1, 7),
            _ => $f!(1, 8),
        }
    };
}

with_best!(fn floats<W: Element>(block: &Block<W>, first: usize, x: &[f32]) = floats_body);

#[inline(always)]
fn floats_body<W: Element, V: Vector>(block: &Block<W>, first: usize, x: &[f32]) {
    macro_rules! columns {
        ($u:literal, $b:literal) => {
            for (at, w) in block.weights.chunks_exact(block.k).enumerate() {
                let sums = dots::<W, V, $u, $b>(w, x, block.k);
                sums.into_iter().enumerate().for_each(|(b, sum)| block.write(first + b, at, sum));
            }
        };
    }
    with_rows!(x.len() / block.k, columns)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn pairs<W: Element>(block: &Block<W>, first: usize, x: &[u16]) {
    macro_rules! columns {
        ($u:literal, $b:literal) => {
            for (at, w) in block.weights.chunks_exact(block.k).enumerate() {
                let sums = dots_bf16::<W, $u, $b>(w, x, block.k);
                sums.into_iter().enumerate().for_each(|(b, sum)| block.write(first + b, at, sum));
            }
        };
    }
    with_rows!(x.len() / block.k, columns)
}

/// Sixteen rows of activations at most.
#[cfg(target_arch = "x86_64")]
unsafe fn tile<W: Element>(block: &Block<W>, first: usize, packed: &[u16]) {
    let (k, rows) = (block.k, packed.len() / block.k);
    let whole = block.weights.len() / (amx::STEP * k) * amx::STEP;
    // row by row of y: its rows often lie so that one column of several falls into the same few lines of the cache
    let write = |at: usize, sums: &[f32], count: usize| {
        for b in 0..rows {
            (0..count).for_each(|r| block.write(first + b, at + r, sums[r * rows + b]));
        }
    };
    amx::products(&block.weights[..whole * k], packed, rows, k, |at, sums| write(at, sums, amx::STEP));
    if whole * k < block.weights.len() {
        let mut rest = vec![block.weights[0]; amx::STEP * k]; // filled up with anything
        rest[..block.weights.len() - whole * k].copy_from_slice(&block.weights[whole * k..]);
        let left = block.weights.len() / k - whole;
        amx::products(&rest, packed, rows, k, |_, sums| write(whole, sums, left));
    }
}

//! Each kernel against the plain formula, in the shapes that take different paths: few rows and many, sizes that fit the
//! vectors and the tiles and sizes that do not.

use rustdecode::{attention, linear, Attention, Element, Part, Then};

/// Numbers from -1 to 1, the same each time (a linear congruential generator, Knuth's constants).
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn bf16(x: f32) -> f32 {
    <u16 as Element>::put(x).get()
}

const ROUNDING: f32 = 1.0 / 512.0 + 1e-6; // of an activation to bfloat16

/// No sum is further from the plain one than `tolerance` times the sum of its terms' magnitudes.
fn check<W: Element>(make: impl Fn(f32) -> W, scaled: bool, tolerance: f32) {
    for rows in [1, 2, 3, 8, 9, 16, 17, 40] {
        for (k, ns) in [(64, vec![5]), (96, vec![33]), (128, vec![64, 7, 96]), (50, vec![40])] {
            let x = noise(rows * k, 1);
            let weights: Vec<Vec<W>> =
                ns.iter().map(|n| noise(n * k, 2).into_iter().map(&make).collect()).collect();
            let scales: Vec<Vec<f32>> =
                ns.iter().map(|&n| noise(n, 3).into_iter().map(f32::abs).collect()).collect();
            let parts: Vec<Part<W>> = weights
                .iter()
                .zip(&scales)
                .map(|(w, s)| Part { weights: w, scales: scaled.then_some(s) })
                .collect();
            let width: usize = ns.iter().sum();
            for (norm, then) in [(false, Then::Store), (true, Then::SquaredRelu), (true, Then::Add)] {
                let start = noise(rows * width, 4);
                let mut y = start.clone();
                linear(&x, rows, &parts, &mut y, norm, then);
                for row in 0..rows {
                    let x = &x[row * k..][..k];
                    let rms = (x.iter().map(|x| x * x).sum::<f32>() / k as f32 + f32::EPSILON).sqrt();
                    let mut column = 0;
                    for (w, s) in weights.iter().zip(&scales) {
                        for (w, s) in w.chunks_exact(k).zip(s) {
                            let scale = if scaled { *s } else { 1.0 } / if norm { rms } else { 1.0 };
                            let terms = || x.iter().zip(w).map(|(x, w)| x * w.get() * scale);
                            let (dot, size) = (terms().sum::<f32>(), terms().map(f32::abs).sum::<f32>());
                            let at = row * width + column;
                            let wanted = match then {
                                Then::Store => dot,
                                Then::SquaredRelu => dot.max(0.0).powi(2),
                                Then::Add => start[at] + dot,
                            };
                            let off = tolerance * size;
                            let limit =
                                if then == Then::SquaredRelu { off * (2.0 * dot.abs() + off) } else { off };
                            assert!((y[at] - wanted).abs() <= limit, "{rows} {k}: {} for {wanted}", y[at]);
                            column += 1;
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_product_with_fp32_weights() {
    check(|x| x, false, 1e-6);
}

#[test]
fn a_product_with_bf16_weights_is_off_by_the_rounding_of_activations() {
    check(<u16 as Element>::put, false, ROUNDING);
}

#[test]
fn a_product_with_integers_and_scales() {
    check(|x| (x * 127.0) as i8, true, ROUNDING);
}

#[test]
fn bf16_rounds_to_nearest_even() {
    assert_eq!(bf16(1.0 + 1.0 / 256.0), 1.0);
    assert_eq!(bf16(1.0 + 3.0 / 256.0), 1.0 + 4.0 / 256.0);
    assert_eq!(bf16(-2.5), -2.5);
    assert!(bf16(f32::NAN).is_nan());
}

#[test]
fn attention_is_a_softmax_over_the_rows_cached_keys() {
    let (heads, kv_heads, d, slots, rows) = (4, 2, 48, 20, 3);
    for (window, offset_keys) in [(None, false), (Some(5), false), (Some(5), true)] {
        let a = Attention {
            heads,
            kv_heads,
            head_dim: d,
            cos: &vec![1.0; slots * d / 2], // no rotation
            sin: &vec![0.0; slots * d / 2],
            window,
            offset_keys,
            key_slots: slots + 1,
            value_slots: slots,
        };
        let positions = [0, 7, 19];
        let qkv = noise(rows * (heads + 2 * kv_heads) * d, 5);
        let mut keys = noise(rows * (slots + 1) * kv_heads * d, 6);
        let mut values = noise(rows * slots * kv_heads * d, 7);
        let (mut wanted_keys, mut wanted_values) = (keys.clone(), values.clone());
        let mut y = vec![0.0; rows * heads * d];
        attention(&a, &qkv, &positions, &mut keys, &mut values, &mut y);

        let unit = |x: &[f32]| -> Vec<f32> {
            let rms = (x.iter().map(|x| x * x).sum::<f32>() / d as f32 + f32::EPSILON).sqrt();
            x.iter().map(|x| x / rms).collect()
        };
        for (row, &at) in positions.iter().enumerate() {
            let at = at as usize;
            let parts: Vec<&[f32]> = qkv.chunks_exact(d).skip(row * (heads + 2 * kv_heads)).collect();
            for h in 0..kv_heads {
                for (i, x) in unit(parts[heads + h]).into_iter().enumerate() {
                    let slow = offset_keys && i % (d / 2) >= d / 4;
                    let slot = at + usize::from(slow);
                    wanted_keys[((row * (slots + 1) + slot) * kv_heads + h) * d + i] = x;
                }
                let to = ((row * slots + at) * kv_heads + h) * d;
                wanted_values[to..to + d].copy_from_slice(parts[heads + kv_heads + h]);
            }
            for h in 0..heads {
                let query = unit(parts[h]);
                let kv = h / (heads / kv_heads);
                let first = window.map_or(0, |w: usize| at.saturating_sub(w));
                let key = |s: usize| &wanted_keys[((row * (slots + 1) + s) * kv_heads + kv) * d..][..d];
                let value = |s: usize| &wanted_values[((row * slots + s) * kv_heads + kv) * d..][..d];
                let score = |s: usize| {
                    let dot: f32 = query.iter().zip(key(s)).map(|(q, k)| q * k).sum();
                    (dot / (d as f32).sqrt()).exp()
                };
                let total: f32 = (first..=at).map(score).sum();
                for i in 0..d {
                    let sum: f32 = (first..=at).map(|s| score(s) * value(s)[i]).sum();
                    let got = y[(row * heads + h) * d + i];
                    assert!((got - sum / total).abs() < 1e-5, "{got} for {}", sum / total);
                }
            }
        }
        let differences = keys.iter().zip(&wanted_keys).chain(values.iter().zip(&wanted_values));
        assert!(differences.into_iter().all(|(a, b)| (a - b).abs() < 1e-6));
    }
}

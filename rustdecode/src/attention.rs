//! One query position per row against that row's cached keys and values.

use crate::lanes::{add_scaled, dots, prefetch, with_best, Element, Vector};
use crate::linear::inverse_rms;
use crate::parallel;

/// Shapes and settings of a call. D = head_dim; the rotary tables are (positions, D/2).
pub struct Attention<'a> {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    pub window: Option<usize>, // earlier positions seen
    pub offset_keys: bool,     // the slow channels of a key go to the slot after its own
    pub key_slots: usize,      // of a row in the cache
    pub value_slots: usize,
}

/// A cache whose rows and heads are written by one thread each.
struct Cache<T>(*mut T);
unsafe impl<T> Sync for Cache<T> {}

/// Rotate and normalise each row's query and key, put key and value into the cache at the row's position, and attend.
///
/// qkv: (rows, (heads + 2 kv_heads) D); keys: (rows, key_slots, kv_heads, D); values: (rows, value_slots, kv_heads, D);
/// y: (rows, heads D).
pub fn attention<T: Element>(
    a: &Attention,
    qkv: &[f32],
    positions: &[i64],
    keys: &mut [T],
    values: &mut [T],
    y: &mut [f32],
) {
    let rows = positions.len();
    let (d, kv) = (a.head_dim, a.kv_heads);
    assert_eq!(qkv.len(), rows * (a.heads + 2 * kv) * d);
    assert_eq!(y.len(), rows * a.heads * d);
    assert!(keys.len() >= rows * a.key_slots * kv * d && values.len() >= rows * a.value_slots * kv * d);
    for &p in positions {
        let p = p as usize;
        assert!(
            p < a.value_slots && p + usize::from(a.offset_keys) < a.key_slots,
            "position {p} is beyond the cache"
        );
        assert!((p + 1) * d / 2 <= a.cos.len(), "position {p} is beyond the rotary tables");
    }
    let (keys, values, y) = (Cache(keys.as_mut_ptr()), Cache(values.as_mut_ptr()), Cache(y.as_mut_ptr()));
    let read: usize = positions.iter().map(|&p| 2 * p as usize * kv * d * size_of::<T>()).sum();
    parallel::run(rows * kv, read, &|i| one_head(a, qkv, positions, i / kv, i % kv, &keys, &values, &y));
}

with_best!(fn one_head<T: Element>(
    a: &Attention, qkv: &[f32], positions: &[i64], row: usize, head: usize, keys: &Cache<T>, values: &Cache<T>, y: &Cache<f32>,
) = one_head_body);

/// A key/value head of a row, with the query heads that share it.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn one_head_body<T: Element, V: Vector>(
    a: &Attention,
    qkv: &[f32],
    positions: &[i64],
    row: usize,
    head: usize,
    keys: &Cache<T>,
    values: &Cache<T>,
    y: &Cache<f32>,
) {
    let (d, kv, at) = (a.head_dim, a.kv_heads, positions[row] as usize);
    let qkv = &qkv[row * (a.heads + 2 * kv) * d..][..(a.heads + 2 * kv) * d];
    let stride = kv * d; // from slot to slot
    let keys = unsafe { keys.0.add(row * a.key_slots * stride + head * d) };
    let values = unsafe { values.0.add(row * a.value_slots * stride + head * d) };
    let key = |slot: usize| unsafe { std::slice::from_raw_parts_mut(keys.add(slot * stride), d) };
    let value = |slot: usize| unsafe { std::slice::from_raw_parts_mut(values.add(slot * stride), d) };

    let new_key = turned(a, &qkv[(a.heads + head) * d..][..d], at);
    for (i, &x) in new_key.iter().enumerate() {
        let is_slow = a.offset_keys && i % (d / 2) >= d / 4;
        key(at + usize::from(is_slow))[i] = T::put(x);
    }
    for (to, &x) in value(at).iter_mut().zip(&qkv[(a.heads + kv + head) * d..][..d]) {
        *to = T::put(x);
    }

    let first = a.window.map_or(0, |w| at.saturating_sub(w));
    let group = a.heads / kv;
    let mut weights = vec![0f32; at + 1 - first];
    for h in head * group..(head + 1) * group {
        let mut query = turned(a, &qkv[h * d..][..d], at);
        let scale = (d as f32).powf(-0.5);
        query.iter_mut().for_each(|x| *x *= scale);
        let mut top = f32::NEG_INFINITY;
        for (slot, w) in (first..).zip(weights.iter_mut()) {
            prefetch_slot(key(slot), stride);
            [*w] = dots::<T, V, 2, 1>(key(slot), &query, d);
            top = top.max(*w);
        }
        let mut total = 0.0;
        for w in weights.iter_mut() {
            *w = (*w - top).exp();
            total += *w;
        }
        let mut acc = vec![0f32; d];
        for (slot, w) in (first..).zip(&weights) {
            prefetch_slot(value(slot), stride);
            add_scaled::<T, V>(&mut acc, *w, value(slot));
        }
        let y = unsafe { std::slice::from_raw_parts_mut(y.0.add((row * a.heads + h) * d), d) };
        for (y, acc) in y.iter_mut().zip(acc) {
            *y = acc / total;
        }
    }
}

/// Ask for what this head has some slots further on: a head's part of a slot is too short for the machine to guess it.
#[inline(always)]
fn prefetch_slot<T>(part: &[T], stride: usize) {
    let ahead = part.as_ptr().wrapping_add(8 * stride).cast::<u8>();
    for line in (0..size_of_val(part)).step_by(64) {
        prefetch(ahead.wrapping_add(line));
    }
}

/// Rotated by its position, halves layout, then normalised.
fn turned(a: &Attention, x: &[f32], at: usize) -> Vec<f32> {
    let half = a.head_dim / 2;
    let (cos, sin) = (&a.cos[at * half..][..half], &a.sin[at * half..][..half]);
    let mut out = vec![0f32; 2 * half];
    for i in 0..half {
        out[i] = x[i] * cos[i] + x[half + i] * sin[i];
        out[half + i] = x[half + i] * cos[i] - x[i] * sin[i];
    }
    let scale = inverse_rms(&out);
    out.iter_mut().for_each(|x| *x *= scale);
    out
}

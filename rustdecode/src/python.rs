//! The face in Python: addresses of torch tensors in, results written where they belong. `nanochat/cpu_decode.py`, the
//! only caller, checks shapes and dtypes; the GIL is let go.

use std::slice::{from_raw_parts, from_raw_parts_mut};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::attention::{attention as attend, Attention};
use crate::lanes::Element;
use crate::linear::{linear as multiply, Part, Then};

/// (address of the weights, address of the scales or 0, rows)
type Address = (usize, usize, usize);

unsafe fn multiply_from<W: Element>(
    x: usize,
    rows: usize,
    k: usize,
    parts: &[Address],
    y: usize,
    norm: bool,
    then: Then,
) {
    let width: usize = parts.iter().map(|p| p.2).sum();
    let parts: Vec<Part<W>> = parts
        .iter()
        .map(|&(weights, scales, n)| Part {
            weights: from_raw_parts(weights as *const W, n * k),
            scales: (scales != 0).then(|| from_raw_parts(scales as *const f32, n)),
        })
        .collect();
    let x = from_raw_parts(x as *const f32, rows * k);
    multiply(x, rows, &parts, from_raw_parts_mut(y as *mut f32, rows * width), norm, then);
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn linear(
    py: Python,
    kind: &str,
    x: usize,
    rows: usize,
    k: usize,
    parts: Vec<Address>,
    y: usize,
    norm: bool,
    then: &str,
) -> PyResult<()> {
    let then = match then {
        "store" => Then::Store,
        "squared_relu" => Then::SquaredRelu,
        "add" => Then::Add,
        _ => return Err(PyValueError::new_err(format!("no {then:?} to do with a product"))),
    };
    let run: unsafe fn(usize, usize, usize, &[Address], usize, bool, Then) = match kind {
        "float32" => multiply_from::<f32>,
        "bfloat16" => multiply_from::<u16>,
        "int8" => multiply_from::<i8>,
        _ => return Err(PyValueError::new_err(format!("no weights of {kind}"))),
    };
    py.detach(|| unsafe { run(x, rows, k, &parts, y, norm, then) });
    Ok(())
}

#[pyclass(frozen)]
struct Layer {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    offset_keys: bool,
}

#[pymethods]
impl Layer {
    #[new]
    fn new(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>, offset_keys: bool) -> Self {
        Layer { heads, kv_heads, head_dim, window, offset_keys }
    }

    /// positions: (rows,) int64; rotary: addresses of cos and sin, and their length; keys and values: address, slots a row.
    #[allow(clippy::too_many_arguments, clippy::type_complexity)]
    fn attention(
        &self,
        py: Python,
        kind: &str,
        qkv: usize,
        rows: usize,
        positions: usize,
        rotary: (usize, usize, usize),
        keys: (usize, usize),
        values: (usize, usize),
        y: usize,
    ) -> PyResult<()> {
        let run: unsafe fn(
            &Layer,
            usize,
            usize,
            usize,
            (usize, usize, usize),
            (usize, usize),
            (usize, usize),
            usize,
        ) = match kind {
            "float32" => attend_from::<f32>,
            "bfloat16" => attend_from::<u16>,
            _ => return Err(PyValueError::new_err(format!("no cache of {kind}"))),
        };
        py.detach(|| unsafe { run(self, qkv, rows, positions, rotary, keys, values, y) });
        Ok(())
    }
}

#[allow(clippy::too_many_arguments)]
unsafe fn attend_from<T: Element>(
    layer: &Layer,
    qkv: usize,
    rows: usize,
    positions: usize,
    rotary: (usize, usize, usize),
    keys: (usize, usize),
    values: (usize, usize),
    y: usize,
) {
    let (heads, kv, d) = (layer.heads, layer.kv_heads, layer.head_dim);
    let a = Attention {
        heads,
        kv_heads: kv,
        head_dim: d,
        cos: from_raw_parts(rotary.0 as *const f32, rotary.2),
        sin: from_raw_parts(rotary.1 as *const f32, rotary.2),
        window: layer.window,
        offset_keys: layer.offset_keys,
        key_slots: keys.1,
        value_slots: values.1,
    };
    attend(
        &a,
        from_raw_parts(qkv as *const f32, rows * (heads + 2 * kv) * d),
        from_raw_parts(positions as *const i64, rows),
        from_raw_parts_mut(keys.0 as *mut T, rows * keys.1 * kv * d),
        from_raw_parts_mut(values.0 as *mut T, rows * values.1 * kv * d),
        from_raw_parts_mut(y as *mut f32, rows * heads * d),
    );
}

#[pyfunction]
fn set_threads(threads: usize, fork: usize) {
    crate::parallel::set_threads(threads, fork);
}

#[pymodule]
fn rustdecode(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(linear, m)?)?;
    m.add_function(wrap_pyfunction!(set_threads, m)?)?;
    m.add_class::<Layer>()?;
    Ok(())
}

//! What a decode step costs on a CPU is reading the weights. These kernels read each once for a few rows of activations,
//! convert on the way and add up in fp32: `linear` multiplies, `attention` reads a key and value cache, `lanes` holds the
//! inner loops, `parallel` spreads them over threads. None of these knows Python; `python` (feature `python`) is the thin
//! face that the extension shows.

// Sums and addresses count together; what unsafe functions ask for stands with their traits.
#![allow(clippy::needless_range_loop, clippy::missing_safety_doc, clippy::missing_transmute_annotations)]

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod lanes;
mod linear;
mod parallel;
#[cfg(feature = "python")]
mod python;

pub use attention::{attention, Attention};
pub use lanes::Element;
pub use linear::{linear, Part, Then};
pub use parallel::set_threads;

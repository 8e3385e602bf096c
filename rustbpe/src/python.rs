//! The face that Python sees: convert, release the GIL, map errors. No algorithm lives here.

use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyError, PyKeyboardInterrupt, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyIterator, PyString};
use rayon::prelude::*;

use crate::{train, BpeError, ChunkCounts, Pair, Splitter, Vocab, DEFAULT_PATTERN, NUM_BYTES};

/// How often the merge loop asks Python for a pending Ctrl-C.
const SIGNAL_PERIOD: Duration = Duration::from_millis(100);

impl From<BpeError> for PyErr {
    fn from(error: BpeError) -> Self {
        let message = error.to_string();
        match error {
            BpeError::VocabTooSmall { .. } | BpeError::BadPattern { .. } => PyValueError::new_err(message),
            BpeError::Split { .. } | BpeError::TooManyChunks => PyValueError::new_err(message),
            BpeError::UnknownToken { .. } => PyKeyError::new_err(message),
            BpeError::Interrupted => PyKeyboardInterrupt::new_err(message),
        }
    }
}

/// A byte-level BPE tokenizer: `rustbpe.pyi` tells its methods.
#[pyclass(module = "rustbpe")]
struct Tokenizer {
    splitter: Splitter,
    vocab: Vocab,
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self { splitter: Splitter::new(DEFAULT_PATTERN)?, vocab: Vocab::default() })
    }

    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None))]
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: u32,
        buffer_size: usize,
        pattern: Option<&str>,
    ) -> PyResult<()> {
        if buffer_size == 0 {
            return Err(PyValueError::new_err("buffer_size is 0; use 1 or more texts"));
        }
        if vocab_size < NUM_BYTES {
            return Err(BpeError::VocabTooSmall { vocab_size }.into());
        }
        let splitter = Splitter::new(pattern.unwrap_or(DEFAULT_PATTERN))?;
        let counts = count_all(py, &iterator.try_iter()?, &splitter, buffer_size)?;
        let found = format!("{} distinct chunks; learning {} merges", counts.len(), vocab_size - NUM_BYTES);
        log_info(py, &found)?;
        let merges = merge_all(py, &counts, vocab_size)?;
        self.vocab = Vocab::new(&merges)?;
        self.splitter = splitter;
        Ok(())
    }

    fn get_pattern(&self) -> &str {
        self.splitter.pattern()
    }

    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, usize)> {
        let tokens = self.vocab.tokens().iter().enumerate();
        tokens.map(|(id, token)| (PyBytes::new(py, token), id)).collect()
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    fn encode(&self, py: Python<'_>, text: &Bound<'_, PyString>) -> PyResult<Vec<u32>> {
        let text = to_rust(text)?;
        Ok(py.detach(|| self.encode_text(&text))?)
    }

    fn batch_encode(&self, py: Python<'_>, texts: Vec<Bound<'_, PyString>>) -> PyResult<Vec<Vec<u32>>> {
        let texts = texts.iter().map(to_rust).collect::<PyResult<Vec<String>>>()?;
        let encode_all = || texts.par_iter().map(|text| self.encode_text(text)).collect();
        let ids: Result<_, BpeError> = py.detach(encode_all);
        Ok(ids?)
    }

    fn decode(&self, ids: Vec<u32>) -> PyResult<String> {
        Ok(String::from_utf8_lossy(&self.vocab.decode(&ids)?).into_owned())
    }
}

impl Tokenizer {
    fn encode_text(&self, text: &str) -> Result<Vec<u32>, BpeError> {
        let mut ids = Vec::new();
        self.splitter.split(text, |chunk| self.vocab.encode_chunk(chunk.as_bytes(), &mut ids))?;
        Ok(ids)
    }
}

/// Count everything the iterator yields. Python fills one buffer while a thread counts the one before.
fn count_all(
    py: Python<'_>,
    iterator: &Bound<'_, PyIterator>,
    splitter: &Splitter,
    buffer_size: usize,
) -> PyResult<ChunkCounts> {
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel::<Vec<String>>(1);
        let counter = scope.spawn(move || -> Result<ChunkCounts, BpeError> {
            let mut counts = ChunkCounts::default();
            for texts in receiver {
                counts.add(splitter, &texts)?;
            }
            Ok(counts)
        });
        loop {
            py.check_signals()?;
            let texts = next_texts(iterator, buffer_size)?;
            if texts.is_empty() {
                break;
            }
            if py.detach(|| sender.send(texts)).is_err() {
                break; // the counter has failed; its error comes out of join
            }
        }
        drop(sender);
        match py.detach(|| counter.join()) {
            Ok(counts) => Ok(counts?),
            Err(_) => Err(PyRuntimeError::new_err("the counting thread died")),
        }
    })
}

/// A str as UTF-8. Surrogates, which UTF-8 cannot hold, are joined to pairs; lone ones become U+FFFD.
fn to_rust(text: &Bound<'_, PyString>) -> PyResult<String> {
    if let Ok(text) = text.to_cow() {
        return Ok(text.into_owned());
    }
    let utf16 = text.call_method1("encode", ("utf-16", "surrogatepass"))?;
    utf16.call_method1("decode", ("utf-16", "replace"))?.extract()
}

/// The next `buffer_size` texts, fewer at the end.
fn next_texts(iterator: &Bound<'_, PyIterator>, buffer_size: usize) -> PyResult<Vec<String>> {
    let mut texts = Vec::new();
    while texts.len() < buffer_size {
        let Some(item) = iterator.clone().next() else { break };
        let item = item?;
        let Ok(text) = item.cast::<PyString>() else {
            let kind = item.get_type();
            return Err(PyTypeError::new_err(format!("the iterator must yield str, not {kind}")));
        };
        texts.push(to_rust(text)?);
    }
    Ok(texts)
}

/// Train with the GIL released, log each percent, and stop when Python holds a signal such as Ctrl-C.
fn merge_all(py: Python<'_>, counts: &ChunkCounts, vocab_size: u32) -> PyResult<Vec<Pair>> {
    let mut python_error = None;
    let mut last_check = Instant::now();
    let on_merge = |done: usize, planned: usize| {
        let percent = |done: usize| done * 100 / planned;
        let is_new_percent = percent(done) > percent(done - 1);
        if is_new_percent || last_check.elapsed() >= SIGNAL_PERIOD {
            last_check = Instant::now();
            let outcome = Python::attach(|py| {
                if is_new_percent {
                    log_info(py, &format!("merges: {}% ({done}/{planned})", percent(done)))?;
                }
                py.check_signals()
            });
            python_error = outcome.err();
        }
        match python_error {
            Some(_) => Err(BpeError::Interrupted),
            None => Ok(()),
        }
    };
    let merges = py.detach(|| train(counts.iter(), vocab_size, on_merge));
    match python_error {
        Some(error) => Err(error),
        None => Ok(merges?),
    }
}

/// `logging.getLogger("rustbpe").info(message)`. Its errors count: a signal may arrive inside of it.
fn log_info(py: Python<'_>, message: &str) -> PyResult<()> {
    let logger = py.import("logging")?.call_method1("getLogger", ("rustbpe",))?;
    logger.call_method1("info", (message,)).map(drop)
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()
}

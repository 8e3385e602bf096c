//! The face that Python sees: convert, release the GIL, map errors. No algorithm lives here.

use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyError, PyKeyboardInterrupt, PyTypeError, PyUnicodeEncodeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyIterator, PyString};

use crate::{
    encode_all, train, Batch, BpeError, ChunkCounts, Counter, Pair, Splitter, Vocab, DEFAULT_PATTERN,
    NUM_BYTES,
};

/// How often the merge loop shows its progress and asks Python for a pending Ctrl-C.
const SIGNAL_PERIOD: Duration = Duration::from_millis(100);
/// A batch of texts is handed to the workers when it has this many bytes, or `buffer_size` texts.
const BATCH_BYTES: usize = 4 << 20;

impl From<BpeError> for PyErr {
    fn from(error: BpeError) -> Self {
        let message = error.to_string();
        match error {
            BpeError::VocabTooSmall { .. } | BpeError::BadPattern { .. } => PyValueError::new_err(message),
            BpeError::BadBytes | BpeError::BadMerge { .. } | BpeError::BadToken { .. } => {
                PyValueError::new_err(message)
            }
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
        Ok(Self { splitter: Splitter::new(DEFAULT_PATTERN)?, vocab: Vocab::from_merges(&[])? })
    }

    #[staticmethod]
    fn from_merges(pattern: &str, bytes: &[u8], merges: &[u8]) -> PyResult<Self> {
        if !merges.len().is_multiple_of(8) {
            let message = format!("merges has {} bytes; use two uint32 for each merge", merges.len());
            return Err(PyValueError::new_err(message));
        }
        let ids: Vec<u32> = merges.as_chunks().0.iter().map(|&id| u32::from_ne_bytes(id)).collect();
        let pairs: Vec<Pair> = ids.as_chunks().0.iter().map(|&[left, right]| (left, right)).collect();
        Ok(Self { splitter: Splitter::new(pattern)?, vocab: Vocab::new(bytes, &pairs)? })
    }

    #[staticmethod]
    fn from_tokens(pattern: &str, tokens: Vec<Bound<'_, PyBytes>>) -> PyResult<Self> {
        let tokens: Vec<&[u8]> = tokens.iter().map(|token| token.as_bytes()).collect();
        Ok(Self { splitter: Splitter::new(pattern)?, vocab: Vocab::from_tokens(&tokens)? })
    }

    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, progress=None))]
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: u64,
        buffer_size: usize,
        pattern: Option<&str>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        if buffer_size == 0 {
            return Err(PyValueError::new_err("buffer_size is 0; use 1 or more texts"));
        }
        let vocab_size = match u32::try_from(vocab_size) {
            Ok(size) if size < NUM_BYTES => return Err(BpeError::VocabTooSmall { vocab_size: size }.into()),
            Ok(size) if size <= 1 << 31 => size,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "vocab_size {vocab_size} is above 2^31 ids; use fewer"
                )))
            }
        };
        let splitter = Splitter::new(pattern.unwrap_or(DEFAULT_PATTERN))?;
        let counts = count_all(py, &iterator.try_iter()?, &splitter, buffer_size)?;
        let found = format!("{} distinct chunks; learning {} merges", counts.len(), vocab_size - NUM_BYTES);
        log_info(py, &found)?;
        let merges = merge_all(py, &counts, vocab_size, progress)?;
        self.vocab = Vocab::from_merges(&merges)?;
        self.splitter = splitter;
        Ok(())
    }

    fn get_pattern(&self) -> &str {
        self.splitter.pattern()
    }

    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, usize)> {
        let tokens = self.vocab.tokens().enumerate();
        tokens.map(|(id, token)| (PyBytes::new(py, token), id)).collect()
    }

    fn get_merges<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let ids: Vec<u32> = self.vocab.merges().iter().flat_map(|&(left, right)| [left, right]).collect();
        to_bytes(py, &[ids])
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    fn encode(&self, py: Python<'_>, text: &Bound<'_, PyString>) -> PyResult<Vec<u32>> {
        let rows = self.encode_rows(py, std::slice::from_ref(text), None, 1)?;
        Ok(rows.into_iter().flatten().collect())
    }

    #[pyo3(signature = (texts, num_threads=0))]
    fn batch_encode(
        &self,
        py: Python<'_>,
        texts: Vec<Bound<'_, PyString>>,
        num_threads: usize,
    ) -> PyResult<Vec<Vec<u32>>> {
        self.encode_rows(py, &texts, None, num_threads)
    }

    #[pyo3(signature = (texts, prepend=None, num_threads=0))]
    fn encode_to_buffer<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        prepend: Option<u32>,
        num_threads: usize,
    ) -> PyResult<(Bound<'py, PyBytes>, Vec<usize>)> {
        let rows = self.encode_rows(py, &texts, prepend, num_threads)?;
        let lengths: Vec<usize> = rows.iter().map(Vec::len).collect();
        Ok((to_bytes(py, &rows)?, lengths))
    }

    fn decode(&self, ids: Vec<u32>) -> PyResult<String> {
        Ok(String::from_utf8_lossy(&self.vocab.decode(&ids)?).into_owned())
    }
}

impl Tokenizer {
    fn encode_rows(
        &self,
        py: Python<'_>,
        texts: &[Bound<'_, PyString>],
        prepend: Option<u32>,
        num_threads: usize,
    ) -> PyResult<Vec<Vec<u32>>> {
        let texts =
            texts.iter().enumerate().map(|(index, text)| utf8(text, index)).collect::<PyResult<Vec<_>>>()?;
        Ok(py.detach(|| encode_all(&self.splitter, &self.vocab, &texts, prepend, num_threads))?)
    }
}

/// All ids end to end, four bytes each as this machine has them.
fn to_bytes<'py>(py: Python<'py>, rows: &[Vec<u32>]) -> PyResult<Bound<'py, PyBytes>> {
    PyBytes::new_with(py, 4 * rows.iter().map(Vec::len).sum::<usize>(), |mut buffer| {
        for row in rows {
            let (bytes, rest) = buffer.split_at_mut(4 * row.len());
            bytes.copy_from_slice(bytemuck::cast_slice(row));
            buffer = rest;
        }
        Ok(())
    })
}

/// A str as UTF-8, without a copy where Python keeps it so.
fn utf8<'t>(text: &'t Bound<'_, PyString>, index: usize) -> PyResult<&'t str> {
    text.to_str().map_err(|error| match error.is_instance_of::<PyUnicodeEncodeError>(text.py()) {
        true => PyValueError::new_err(format!(
            "text {index} has half a surrogate pair, which is no character ({error}); \
             replace it: text.encode('utf-8', 'replace').decode()"
        )),
        false => error,
    })
}

/// Count everything the iterator yields, on other threads while Python makes the next texts.
fn count_all(
    py: Python<'_>,
    iterator: &Bound<'_, PyIterator>,
    splitter: &Splitter,
    buffer_size: usize,
) -> PyResult<ChunkCounts> {
    let counter = Counter::new(splitter);
    let mut batch = Batch::default();
    let mut is_empty = true;
    for (index, item) in iterator.try_iter()?.enumerate() {
        let item = item?;
        let Ok(text) = item.cast::<PyString>() else {
            let kind = item.get_type();
            let message = format!("the iterator must yield str, but item {index} is {kind}");
            return Err(PyTypeError::new_err(message));
        };
        let text = utf8(text, index)?;
        is_empty &= text.is_empty();
        batch.push(text);
        if batch.num_texts() >= buffer_size || batch.num_bytes() >= BATCH_BYTES {
            py.check_signals()?;
            let full = std::mem::take(&mut batch);
            if !py.detach(|| counter.send(full)) {
                break; // its error comes out of finish
            }
        }
    }
    if is_empty {
        return Err(PyValueError::new_err("the iterator gave no text; train on one text or more"));
    }
    Ok(py.detach(|| {
        counter.send(batch);
        counter.finish()
    })?)
}

/// Train with the GIL released, tell `progress` and the log, and stop when Python holds a signal such as Ctrl-C.
fn merge_all(
    py: Python<'_>,
    counts: &ChunkCounts,
    vocab_size: u32,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<Vec<Pair>> {
    let progress = progress.map(|callable| callable.clone().unbind());
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
                if let Some(progress) = &progress {
                    progress.call1(py, (done, planned))?;
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
    let merges = py.detach(|| train(counts, vocab_size, on_merge));
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

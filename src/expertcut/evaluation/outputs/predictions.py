"""`predictions.parquet`: a row for every model and question, for data frames."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expertcut.data import Quiz
from expertcut.data.questions import LETTERS

if TYPE_CHECKING:
    import pyarrow as pa

    from expertcut.evaluation.evaluate import Scored

Array = np.ndarray[Any, Any]


def predictions_path(results: Path) -> Path:
    """Beside the results: `predictions.parquet`, or `x.predictions.parquet` where these are `x`."""
    if results.stem == "results":
        return results.with_name("predictions.parquet")
    return results.with_name(f"{results.stem}.predictions.parquet")


def predictions_bytes(quiz: Quiz, scored: Sequence["Scored"]) -> bytes:
    """The file's bytes; its columns are those of docs/formats.md."""
    import pyarrow as pa
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pa.concat_tables([_table(quiz, one) for one in scored]), stream)
    return stream.getvalue()


def _table(quiz: Quiz, scored: "Scored") -> "pa.Table":
    import pyarrow as pa

    found, letters = scored.answers, np.array(list(LETTERS))
    columns: dict[str, Any] = {
        "model": pa.array([scored.source.id] * len(quiz)).dictionary_encode(),
        "subject": pa.array([q.subject for q in quiz]).dictionary_encode(),
        "row": pa.array([q.row for q in quiz], pa.int32()),
        "answer": letters[found.answer_N],
        "prediction": letters[found.logprob_NC.argmax(axis=1)],
        "is_correct": found.is_correct_N,
    }
    for choice, logprob_N in enumerate(found.logprob_NC.T):
        # A question with fewer choices has −∞ there, which is no log-probability.
        columns[f"logprob_{LETTERS[choice]}"] = pa.array(logprob_N, mask=~np.isfinite(logprob_N))
    return pa.table(columns)

"""A method's loss and metrics of each source of mixed data, for any method."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pjpo.metrics import Mean
from pjpo.types import Batch


def per_source(loss: Callable, sources: Sequence[str]) -> Callable:
    """The same loss, whose metrics hold `source/<name>/loss` and `source/<name>/<metric>` too.

    A method counts no completion whose masks are empty, so the numbers of one source are those of the batch with all
    others masked. They are means with their counts: a source that a batch lacks adds nothing to what is logged.

    Args:
        loss: `loss(method, batch, logps, ref_logps, **others) -> (Mean, metrics)`, as in `pjpo.methods`.
        sources: names; `batch.sources` are places here.
    """

    @functools.wraps(loss)  # its signature says what it reads of the policy
    def with_sources(method: Any, batch: Batch, logps, ref_logps, **others) -> tuple[Mean, dict[str, Mean]]:
        mean, metrics = loss(method, batch, logps, ref_logps, **others)
        assert batch.sources is not None, "mixed data says of each prompt where it came from"
        arguments = jax.lax.stop_gradient((logps, ref_logps, others))
        for number, name in enumerate(sources):
            here = (batch.sources == number)[:, None, None]
            masks = {"loss_mask": batch.loss_mask & here, "completion_mask": batch.completion_mask & here}
            own = dataclasses.replace(batch, **masks)
            own_mean, own_metrics = loss(method, own, arguments[0], arguments[1], **arguments[2])
            own_metrics = {"loss": own_mean, **own_metrics}
            metrics = metrics | {f"source/{name}/{metric}": value for metric, value in own_metrics.items()}
        return mean, metrics

    return with_sources

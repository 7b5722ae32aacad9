"""What a checkpoint was made from, as far as it is at hand."""

import logging
from pathlib import Path

from expertcut.edits.plan import PLAN_FILE, Plan, load_plan
from expertcut.errors import ModelError
from expertcut.models.checkpoint_dir import find_local
from expertcut.models.load import Source, find_source

logger = logging.getLogger(__name__)

_MOST_STEPS = 20


def plan_of(source: Source) -> Plan | None:
    """The plan in a checkpoint's folder.

    Raises:
        PlanError: one that does not hold together.
    """
    return load_plan(source.path) if (source.path / PLAN_FILE).is_file() else None


def first_base(source: Source) -> Source | None:
    """The model under all steps, if each of them is there unchanged; None for a model without."""
    base: Source | None = None
    here = source
    for _ in range(_MOST_STEPS):
        plan = plan_of(here)
        if plan is None:
            break
        try:
            here = _source_of(plan, here.path)
        except ModelError as error:
            logger.warning("the base is not at hand: %s", error)
            return None
        if here.fingerprint != plan.model.fingerprint:
            logger.warning("%s is not at hand as it was: it changed since", Path(here.id))
            return None
        base = here
    return base


def _source_of(plan: Plan, near: Path) -> Source:
    """The model that a plan is for; a folder where it is there with its weights.

    Raises:
        ModelError: it is not there.
    """
    model = plan.model
    if model.revision is not None:
        return find_source(model.id, model.revision)
    folder = find_local(model.id, model.fingerprint, near)
    if folder is None:
        raise ModelError(f"{model.id} is not there with its weights ({model.fingerprint[:8]})")
    return find_source(str(folder))

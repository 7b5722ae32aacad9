"""Stages that show and give away what a run made: report, publish."""

import json

from expertcut.files import write_atomically
from expertcut.hub.upload import Published, PublishOptions
from expertcut.hub.upload import publish as upload
from expertcut.recipe.acts.job import Job
from expertcut.recipe.sections import PublishSection
from expertcut.recipe.stages import REPORT, RESULTS
from expertcut.reporting.page import write


def report(job: Job) -> None:
    """The page of the run folder."""
    job.audience.say([], [f"written to {write(job.run)}"])


def publish(job: Job) -> None:
    """A variant's checkpoint, card and page to the hub; of a variant without one, nothing."""
    asked = next(p for p in job.recipe.publish if p.variant == job.stage.settings["variant"])
    checkpoint = job.checkpoints().get(asked.variant)
    outcome: dict[str, object] = {"repo": asked.repo, "url": None, "commit": None}
    if checkpoint is None:
        job.audience.say([], [f"{asked.variant} made no checkpoint, so there is none to publish"])
    else:
        if job.recipe.report:
            write_atomically(checkpoint / REPORT, (job.run / REPORT).read_bytes())
        done = upload(checkpoint, asked.repo, _options(job, asked))
        outcome |= {"url": done.url, "commit": done.commit}
        job.audience.say([], [_sentence(done)])
    (place,) = job.stage.makes
    write_atomically(job.run / place, (json.dumps(outcome, indent=1) + "\n").encode())


def _options(job: Job, asked: PublishSection) -> PublishOptions:
    return PublishOptions(
        is_private=asked.private,
        is_dry=asked.dry_run,
        is_forced=asked.force,
        revision=asked.revision,
        results=(job.run / RESULTS,) if job.recipe.eval else (),
    )


def _sentence(done: Published) -> str:
    if done.commit is None:
        return f"the card is written to {done.card}; nothing is uploaded, it would go to {done.url}"
    return f"published to {done.url} (commit {done.commit[:8]})"

"""`bestrq2 push`: export a model and upload it to the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence

from bestrq2 import flags


def push(
    model: str | os.PathLike[str],
    repository: str,
    private: bool = False,
    license: str | None = None,
    revision: str | None = None,
    with_predictor: bool = False,
) -> str:
    """Export a model in hub format and upload it to the Hugging Face hub in one commit.

    Args:
        model: "bestrq2-tiny" (of the package), run or exported folder, reference checkpoint, recipe or hub id.
        repository: repository on the hub, "USER/MODEL"; created if missing.
        private: create a missing repository as private.
        license: license identifier in the model card, such as "mit" or "cc-by-4.0".
        revision: branch to upload to; the main branch by default.
        with_predictor: include predictor, head and quantizer, so that pretraining can continue.

    Returns:
        URL of the model.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    from bestrq2.commands.export import describe_model
    from bestrq2.convert.export import push_model

    source = os.fspath(model)
    return push_model(
        source, repository, private=private, revision=revision, with_predictor=with_predictor,
        describe=describe_model(source, repository, license),
    )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 push`."""
    print(push(**flags.parse_command(push, argv, positional=("model", "repository"))))

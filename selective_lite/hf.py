"""Hugging Face: load a delta's base and the delta in one call; a delta at every checkpoint.

`transformers` is imported when it is needed, not with this module.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from .layers.masked import training_of
from .ship.delta import Delta, load
from .ship.file import DeltaError
from .ship.tuning import Tuning

FILE = "delta.safetensors"  # in a checkpoint's folder


def from_delta(
    path: str | os.PathLike, base: str | os.PathLike | None = None, **kwargs: Any
) -> tuple[Any, Delta]:
    """The model that a delta file belongs to, with the delta in it.

    Parameters
    ----------
    path
        Path of the delta file. It says which base is loaded: take files from people you trust.
    base
        Folder or hub id of the base, where it is not where the file says.
    kwargs
        Arguments of ``from_pretrained``, such as ``device_map``; they win over what the file says
        (class, revision, labels and dtype).

    Returns
    -------
    model, delta
        The tuned model in evaluation mode, and the delta that it has.

    Raises
    ------
    DeltaError
        If the file is damaged, does not say what its base is, or names a class that `transformers`
        does not have, or the base that was loaded is another one.
    OSError
        If the base is not there.

    Examples
    --------
    >>> model, delta = from_delta("fish.safetensors")
    """
    import transformers
    from transformers.utils import logging

    delta = load(path)
    said = delta.metadata["base"]
    place = str(said.get("name_or_path", "")) if base is None else os.fspath(base)
    if not place:
        raise DeltaError(f"{path} does not say where its base is; give base=, a folder or a hub id")
    cls: Any = getattr(transformers, str(said.get("class")), None)
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not known:
        raise DeltaError(
            f"{path} is for a {said.get('class')}, which is not a model of transformers "
            f"{transformers.__version__}; make the base yourself, then load(path).apply(model)"
        )
    dtype = getattr(torch, str(said.get("dtype")).removeprefix("torch."), None)
    options: dict[str, Any] = {"dtype": dtype} if isinstance(dtype, torch.dtype) else {}
    if base is None and "revision" in said:
        options["revision"] = str(said["revision"])
    if "id2label" in said:
        labels = {int(number): label for number, label in said["id2label"].items()}
        options |= {"id2label": labels, "label2id": {label: n for n, label in labels.items()}}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of a new head, which the delta is about to fill
    try:
        with torch.random.fork_rng(devices=[]):
            model = cls.from_pretrained(place, **{**options, **kwargs})
    except OSError as error:
        raise OSError(f"base {place!r} cannot be loaded; give base=, a folder: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    applied = delta.apply(model)
    return model.eval(), applied.delta


def _tuning(model: Any) -> Tuning:
    training = training_of(model)
    if not isinstance(training, Tuning):
        raise ValueError(
            "SaveDelta needs a model in masked training: "
            "with selective_lite.masked(model, selection): trainer.train(...)"
        )
    return training


def _save_delta() -> type:
    """The class `SaveDelta`, made when it is asked for: it is a `transformers.TrainerCallback`."""
    from transformers import TrainerCallback

    class SaveDelta(TrainerCallback):
        """Write ``delta.safetensors`` into every checkpoint, and resume from it.

        The file has float32 values of every selected weight, so that a half-precision model, too,
        goes on with the bits that it stopped with. Resume as usual, in masked training of the same
        selection (``load(file).selection(model)``) of the base:
        ``trainer.train(resume_from_checkpoint=True)``.

        Parameters
        ----------
        folder
            The checkpoint to resume from, if it is not ``checkpoint-N`` of the Trainer's
            ``output_dir``.

        Raises
        ------
        ValueError
            From `train`: if no masked training is open, or the checkpoint's delta is missing, of
            another selection, or of another base.

        Examples
        --------
        >>> trainer = Trainer(model, args, train_dataset=train, callbacks=[SaveDelta()])
        """

        def __init__(self, folder: str | os.PathLike | None = None) -> None:
            self.folder = folder

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Check that masked training is open; if this goes on from a checkpoint, take it up."""
            tuning = _tuning(kwargs["model"])
            if state.global_step or self.folder is not None:
                folder = self.folder or _checkpoint(args, state)
                file = os.path.join(folder, FILE)
                if not os.path.isfile(file):
                    raise ValueError(
                        f"{file} is missing, the delta of the checkpoint to resume from; if it "
                        "is elsewhere, give SaveDelta(folder=...)"
                    )
                tuning.resume(load(file))

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Write the delta as it is now."""
            delta = _tuning(kwargs["model"]).delta(precise=True)  # gathered by all, if sharded
            if state.is_world_process_zero:
                os.makedirs(_checkpoint(args, state), exist_ok=True)
                delta.save(os.path.join(_checkpoint(args, state), FILE))

    SaveDelta.__qualname__ = "SaveDelta"
    return SaveDelta


def _checkpoint(args: Any, state: Any) -> str:
    return os.path.join(args.output_dir, f"checkpoint-{state.global_step}")


def __getattr__(name: str) -> Any:
    if name != "SaveDelta":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _save_delta()
    return globals()[name]

"""Loading of all artefacts that a server serves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from service.artefact.card import artefact_folders, read_card
from service.artefact.files import CARD_FILE
from service.artefact.pool import VerifierPool
from service.errors import ArtefactError, ModelNotAvailableError, SettingsError, UnknownModelError
from service.inference.classifier import Classifier
from service.inference.novelty import attach_guards
from service.runtime.cpus import usable_cpus
from service.runtime.provider import Resolved, load_on
from service.runtime.session import GpuLimits
from service.settings import Settings, threads_of

if TYPE_CHECKING:
    from service.artefact.signature import Signers

_log = logging.getLogger(__name__)


class Models(dict[str, Classifier]):
    """The served models by name."""

    broken: dict[str, ArtefactError]
    """Models that could not be verified, by name."""
    rejected: dict[str, str]
    """Why a newer version of a served model is not served, by name."""
    shapes: dict[str, tuple[int, int, int]]
    """Channels, height and width of the images of each model."""
    reasons: dict[str, str]
    """Why models are broken, in one line, by name."""

    def __init__(
        self,
        served: Mapping[str, Classifier],
        broken: Mapping[str, ArtefactError] | None = None,
        rejected: Mapping[str, str] | None = None,
    ) -> None:
        """Store all by name."""
        super().__init__(sorted(served.items()))
        self.broken = dict(sorted((broken or {}).items()))
        self.rejected = dict(rejected or {})
        self.shapes = {name: classifier.input_shape for name, classifier in self.items()}
        self.reasons = {name: error.line for name, error in self.broken.items()}

    def __missing__(self, name: str) -> Classifier:
        """Raise `ModelNotAvailableError` for a broken model, and `UnknownModelError` for another."""
        if name in self.broken:
            raise ModelNotAvailableError(name, self.broken[name].line)
        raise UnknownModelError(name, self)


def load_classifiers(
    settings: Settings, pool: VerifierPool | None = None, folders: Sequence[Path] | None = None
) -> Models:
    """Return a classifier for every artefact in `settings.models`, by name, each verified by this run of the server.

    The default model is loaded and has run once, unless that would start threads before a fork; the graphs of the
    others are loaded when they are first run. An artefact with a fault is a line in the log and one of `Models.broken`.

    Args:
        settings: see `service.settings`.
        pool: verifies the folders; default: a new one.
        folders: default: `artefact_folders` of `settings.models`.

    Raises:
        ArtefactError: the folder cannot be read or holds no artefact; or a file of the default model, or of any model
            if `settings.strict`, is missing, damaged or without proof.
        ProviderError: the provider is not available, or the GPU does not run the default model.
        SettingsError: there is no model of the default name, `settings.require_signature` names no keys, or
            `settings.novelty_models` a model that is not served.
    """
    if folders is None:
        folders = artefact_folders(settings.models, settings.default_model)
    if pool is None:
        with VerifierPool(usable_cpus()) as new:
            new.start(folders, (settings.proof_seconds, settings.proof_bytes, settings.proof_work))
            return load_classifiers(settings, new, folders)
    signers = None
    if settings.require_signature:
        from service.artefact.signature import Signers

        signers = Signers.of(settings.require_signature)
        _log.info("a signature of one of %d keys is required", len(signers.keys))
    models = load_on(settings.provider, lambda provider: _load_all(settings, folders, pool, provider, signers))
    for name, error in models.broken.items():
        _log.error("model %s is not served: %s: %s", name, error.file, error.line)
    if settings.default_model not in models:
        raise SettingsError(
            f"LIPCERT_DEFAULT_MODEL={settings.default_model!r}: {settings.models} serves no such model; it has "
            f"{', '.join(models) or 'none without a fault'}"
        )
    attach_guards(models, models.broken, settings.novelty_models)
    return models


def _load_all(
    settings: Settings, folders: Sequence[Path], pool: VerifierPool, provider: Resolved, signers: Signers | None
) -> Models:
    threads = threads_of(settings, usable_cpus())
    limits = gpu_limits(settings)
    served: dict[str, Classifier] = {}
    broken: dict[str, ArtefactError] = {}
    # The default model first: it warms up while others are still being verified.
    for folder in folders:
        try:
            findings = pool.findings(folder)
            classifier = Classifier.from_findings(folder, findings, provider, threads.inference, limits, signers)
            if classifier.name in served:
                raise ArtefactError(
                    folder / CARD_FILE, f"the name {classifier.name!r} is taken by another artefact; change one."
                )
        except ArtefactError as error:
            name = name_of(folder)
            if settings.strict or name == settings.default_model:
                raise
            broken[folder.name if name in served or name in broken else name] = error
            continue
        served[classifier.name] = classifier
        if classifier.name == settings.default_model and threads.run_before_fork:
            classifier.warm_up()
    return Models(served, broken)


def gpu_limits(settings: Settings) -> GpuLimits:
    """Return the limits of each graph on a GPU."""
    return GpuLimits(settings.forward_batch or GpuLimits().batch, settings.gpu_memory_bytes)


def name_of(folder: Path) -> str:
    """Return the name in the card, or that of the folder where the card is the fault."""
    try:
        return read_card(folder).name
    except ArtefactError:
        return folder.name

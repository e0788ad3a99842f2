"""Loading of all artefacts that a server serves."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from service.artefact.card import read_card
from service.artefact.files import CARD_FILE
from service.artefact.folders import artefact_folders, names_of, split_name, version_of
from service.artefact.pool import VerifierPool
from service.errors import ArtefactError, SettingsError
from service.inference.classifier import Classifier
from service.inference.novelty import attach_guards
from service.inference.served import Models, resolved
from service.runtime.cpus import usable_cpus
from service.runtime.provider import Resolved, load_on
from service.runtime.session import GpuLimits
from service.settings import Settings, aliases_of, default_of, threads_of

if TYPE_CHECKING:
    from service.artefact.signature import Signers

_log = logging.getLogger(__name__)


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
            `settings.novelty_models` or `settings.aliases` a model that is not there.
    """
    if folders is None:
        folders = artefact_folders(settings.models, default_of(settings))
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
    has = f"it has {', '.join(sorted(models.shapes)) or 'none without a fault'}"
    for alias, name in aliases_of(settings.aliases).items():
        if alias not in models.further:
            raise SettingsError(f"LIPCERT_ALIASES: {alias}={name}, and {settings.models} has no such model; {has}")
    if models.find(settings.default_model) is None:
        if (name := models.further.get(settings.default_model)) is not None:
            # No version of it is without a fault.
            raise models.broken[name]
        raise SettingsError(
            f"LIPCERT_DEFAULT_MODEL={settings.default_model!r}: {settings.models} serves no such model; {has}"
        )
    attach_guards(models, settings.novelty_models)
    return models


def _load_all(
    settings: Settings, folders: Sequence[Path], pool: VerifierPool, provider: Resolved, signers: Signers | None
) -> Models:
    threads = threads_of(settings, usable_cpus())
    limits = gpu_limits(settings)
    served: dict[str, Classifier] = {}
    broken: dict[str, ArtefactError] = {}
    aliases, default = aliases_of(settings.aliases), default_of(settings)
    # The default model first: it warms up while others are still being verified.
    for folder in folders:
        try:
            findings = pool.findings(folder)
            version = version_of(folder, settings.models)
            classifier = Classifier.from_findings(
                folder, findings, provider, threads.inference, limits, signers, version=version
            )
            check_name(folder, classifier.name, served, aliases)
        except ArtefactError as error:
            name = name_of(folder, settings.models)
            # An older version of the default model can answer.
            if settings.strict or name == default:
                raise
            broken[folder.name if name in served or name in broken else name] = error
            continue
        # Of several versions the highest, which comes first.
        is_default = resolved(default, served) is None and resolved(default, [classifier.name]) is not None
        served[classifier.name] = classifier
        if is_default and threads.run_before_fork:
            classifier.warm_up()
    return Models(served, broken, aliases=aliases)


def check_name(
    folder: Path, name: str, taken: Iterable[str], aliases: Container[str], *, is_default: bool = False
) -> None:
    """Refuse the name of an artefact that means another one.

    Args:
        folder: of the artefact.
        name: under which it would be served.
        taken: names of other artefacts.
        aliases: of the settings.
        is_default: whether the default model is served under another name.

    Raises:
        ArtefactError: the name is taken, by an artefact, by versions of a model or by an alias; or that of the default
            model changes.
    """
    model, version = split_name(name)
    # A model has versions or none.
    if any(other in (name, model) or (not version and split_name(other)[0] == model) for other in taken):
        raise ArtefactError(
            folder / CARD_FILE,
            f"the name {model!r} is taken by another artefact; change one, or make them versions, the folders "
            f"{model}/1 and {model}/2.",
        )
    if model in aliases:
        raise ArtefactError(folder / CARD_FILE, f"the name {model!r} is an alias in LIPCERT_ALIASES; change one.")
    if is_default:
        raise ArtefactError(folder / CARD_FILE, "the default model cannot have another name while the server runs.")


def gpu_limits(settings: Settings) -> GpuLimits:
    """Return the limits of each graph on a GPU."""
    return GpuLimits(settings.forward_batch or GpuLimits().batch, settings.gpu_memory_bytes)


def name_of(folder: Path, models: Path) -> str:
    """Return the name of an artefact in a folder of models: that in the card, or of the folder where the card is the
    fault; of a version that of the folders."""
    if version_of(folder, models) is not None:
        return names_of(folder, models)[0]
    try:
        return read_card(folder).name
    except ArtefactError:
        return folder.name

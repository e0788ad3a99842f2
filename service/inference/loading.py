"""Loading of all artefacts that a server serves."""

from __future__ import annotations

from service.artefact.card import artefact_folders
from service.artefact.pool import VerifierPool
from service.errors import ArtefactError, SettingsError
from service.inference.classifier import Classifier
from service.runtime.cpus import usable_cpus
from service.runtime.provider import Resolved, load_on
from service.runtime.session import GpuLimits
from service.settings import Settings, threads_of


def load_classifiers(settings: Settings, pool: VerifierPool | None = None) -> dict[str, Classifier]:
    """Return a classifier for every artefact in `settings.models`, by name, each verified by this run of the server.

    The default model is loaded and has run once, unless that would start threads before a fork; the graphs of the
    others are loaded when they are first run.

    Args:
        settings: see `service.settings`.
        pool: verifies the folders of `settings.models`; default: a new one.

    Raises:
        ArtefactError: the folder cannot be read or holds no artefact, or a file of one is missing, damaged or without
            proof.
        ProviderError: the provider is not available, or the GPU does not run the default model.
        SettingsError: there is no model of the default name.
    """
    if pool is None:
        with VerifierPool(usable_cpus()) as new:
            folders = artefact_folders(settings.models, settings.default_model)
            new.start(folders, (settings.proof_seconds, settings.proof_bytes, settings.proof_work))
            return load_classifiers(settings, new)
    return load_on(settings.provider, lambda provider: _load_all(settings, pool, provider))


def _load_all(settings: Settings, pool: VerifierPool, provider: Resolved) -> dict[str, Classifier]:
    threads = threads_of(settings, usable_cpus())
    limits = GpuLimits(settings.forward_batch or GpuLimits().batch, settings.gpu_memory_bytes)
    classifiers: dict[str, Classifier] = {}
    # The default model first: it warms up while others are still being verified.
    for folder in artefact_folders(settings.models, settings.default_model):
        classifier = Classifier.from_findings(folder, pool.findings(folder), provider, threads.inference, limits)
        if classifier.name in classifiers:
            raise ArtefactError(
                folder / "card.json", f"the name {classifier.name!r} is taken by another artefact; change one"
            )
        classifiers[classifier.name] = classifier
        if classifier.name == settings.default_model and threads.run_before_fork:
            classifier.warm_up()
    if settings.default_model not in classifiers:
        raise SettingsError(
            f"LIPCERT_DEFAULT_MODEL={settings.default_model!r}: {settings.models} has no such model; it has "
            f"{', '.join(sorted(classifiers))}"
        )
    return dict(sorted(classifiers.items()))

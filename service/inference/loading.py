"""TODO: service/inference/loading.py."""

from __future__ import annotations

from service.artefact.card import artefact_folders
from service.artefact.proving import Provers
from service.errors import ArtefactError, SettingsError
from service.inference.classifier import Classifier
from service.runtime.cpus import usable_cpus
from service.runtime.provider import resolve_provider
from service.settings import Settings, threads_of


def load_classifiers(settings: Settings, provers: Provers | None = None) -> dict[str, Classifier]:
    """Load every artefact in `settings.models`, by name, each proved by this run of the server.

    Args:
        settings: see `service.settings`.
        provers: at work on the folders of `settings.models`; new ones if absent.

    Raises:
        ArtefactError: the folder cannot be read or holds no artefact, or a file of one is missing, damaged or without
            proof.
        ProviderError: the provider cannot be had.
        SettingsError: there is no model of the default name.
    """
    # The default model first: it warms up while others are still being proved.
    folders = artefact_folders(settings.models, settings.default_model)
    if provers is None:
        with Provers(usable_cpus()) as new:
            new.start(folders, settings.provider)
            return load_classifiers(settings, new)
    provider = resolve_provider(settings.provider)
    threads = threads_of(settings, usable_cpus())
    classifiers: dict[str, Classifier] = {}
    for folder in folders:
        classifier = Classifier.proved(folder, provers.findings(folder), provider, threads.inference)
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

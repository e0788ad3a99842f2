"""The catalogue: which models a process serves now, and how that changes while it serves.

A request reads `Catalogue.models` once and answers from these: its digest always belongs to the model that
computed it. A model that is replaced or removed goes when the last request that has it is answered.

::

    Survey (a process beside) ──► planned: cards, signatures, names ──► State ──► Catalogue.follow, in every process
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from service.artefact.card import check_card, parse_card, served_name
from service.artefact.files import CARD_FILE, digest, read_file
from service.artefact.findings import Findings
from service.artefact.folders import split_name, version_of
from service.artefact.rereading import Survey
from service.errors import ArtefactError, LipcertError, SettingsError
from service.inference.classifier import Classifier
from service.inference.loading import check_name, gpu_limits, name_of
from service.inference.novelty import attach_guards
from service.inference.served import Models, resolved
from service.runtime.cpus import usable_cpus
from service.runtime.provider import CUDA
from service.settings import Settings, aliases_of, default_of, threads_of

if TYPE_CHECKING:
    from service.artefact.signature import Signers

_log = logging.getLogger(__name__)

UNKNOWN = "there is no such artefact in the folder of models"
"""Why an order for an unknown name is refused."""


class Order(NamedTuple):
    """A change that somebody asks for."""

    kind: Literal["reload", "load", "unload"]
    name: str = ""
    """Of the model; empty for a reload of the whole folder."""
    id: str = ""
    """Under which a process waits for the result."""


class Entry(NamedTuple):
    """A verified artefact, for every process to make a classifier of."""

    folder: Path
    findings: Findings
    card: bytes
    """Content of `card.json`."""

    @property
    def digests(self) -> tuple[str, str]:
        """Of model and card."""
        return self.findings.digest, digest(self.card)


@dataclass(frozen=True)
class State:
    """Which models every process has to serve; complete, so that a process may miss earlier ones."""

    entries: Mapping[str, Entry | None]
    """By name; null for a model of the start."""
    broken: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    """Faults of artefacts that are not served, by name."""
    rejected: Mapping[str, str] = field(default_factory=dict)
    """Why a newer version is not served, by the name of the model whose older version is."""
    is_reading: bool = False
    """Whether the folder is being read again: models answer whatever is in it."""
    results: Mapping[str, str | None] = field(default_factory=dict)
    """Why the last orders were refused, by their id; null for those that were done."""


class Catalogue:
    """The models of one process. `models` may be read from any thread; one thread calls the methods."""

    models: Models

    def __init__(self, models: Models, settings: Settings) -> None:
        """Serve the models of the start."""
        self.models = models
        self._settings = settings

    def retain(self) -> None:
        """Let all models answer while their folders may have other content."""
        for classifier in self.models.values():
            classifier.files.retain()

    def follow(self, state: State, *, warms: bool) -> None:
        """Serve the models of a state. A model that cannot be loaded here leaves its older version.

        Args:
            state: of `planned`.
            warms: whether to run models that replace others, or older versions, before they are served.
        """
        served: dict[str, Classifier] = {}
        aliases = aliases_of(self._settings.aliases)
        rejected = dict(state.rejected)
        for name, entry in state.entries.items():
            current = self.models.get(name)
            try:
                classifier = self._classifier(entry, current)
                if classifier is None:
                    continue
                if warms and classifier is not current and self.models.find(split_name(name)[0]) is not None:
                    classifier.warm_up()
            except LipcertError as error:
                _log.error("model %s: the new version cannot be loaded: %s", name, error)
                rejected[name] = error.line if isinstance(error, ArtefactError) else str(error)
                classifier = current
            if classifier is not None:
                served[name] = classifier
        for name, classifier in served.items():
            if name in rejected:
                classifier.files.retain()
            else:
                classifier.files.release()
        broken = {name: ArtefactError(*fault) for name, fault in state.broken.items()}
        models = Models(served, broken, rejected, aliases)
        for alias in aliases:
            if alias not in models.further:
                _log.error("LIPCERT_ALIASES: %s stands for %s, which is not served", alias, aliases[alias])
        try:
            attach_guards(models, self._settings.novelty_models)
        except SettingsError as error:
            # Models that the setting names answer without a guard, and requests for it are told so.
            _log.error("%s", error)
        self.models = models

    def _classifier(self, entry: Entry | None, current: Classifier | None) -> Classifier | None:
        if entry is None or (
            current is not None
            and current.files.folder == entry.folder
            and (current.digest, current.card_digest) == entry.digests
        ):
            return current
        # The one provider of this server, which the default model has.
        default = self.models[self._settings.default_model]
        return Classifier.from_findings(
            entry.folder,
            entry.findings,
            "cuda" if default.provider == CUDA else "cpu",
            threads_of(self._settings, usable_cpus()).inference,
            gpu_limits(self._settings),
            content=entry.card,
            version=version_of(entry.folder, self._settings.models),
        )


def planned(
    before: State, survey: Survey, models: Models, settings: Settings, signers: Signers | None, *, only: Path | None
) -> State:
    """Return the state after a survey; a line of the log for each fault.

    Args:
        before: the state until now.
        survey: of the folder.
        models: that are served.
        settings: folder of models, aliases, and the default model, which stays.
        signers: see `Classifier.from_findings`.
        only: the folder that was verified; null for all.
    """
    name_of_folder = {classifier.files.folder: name for name, classifier in models.items()}
    entries, broken, rejected = dict(before.entries), dict(before.broken), dict(before.rejected)
    default, aliases = default_of(settings), aliases_of(settings.aliases)
    gone: list[str] = []
    if only is None:
        broken, rejected = {}, {}
        gone = [name for name, classifier in models.items() if classifier.files.folder not in survey.folders]
        for name in gone:
            del entries[name]
    for folder in survey.folders if only is None else (only,):
        name = name_of_folder.get(folder)
        findings = survey.findings.get(folder)
        if findings is None:
            # As it is served.
            if name is not None:
                rejected.pop(name, None)
            continue
        try:
            found, entry = _checked(folder, findings, version_of(folder, settings.models), signers)
            if found != name:
                check_name(folder, found, entries, aliases, is_default=name == default)
        except ArtefactError as error:
            if name is None:
                called = name_of(folder, settings.models)
                broken[folder.name if called in entries or called in broken else called] = error.file, error.reason
                _log.error("model %s is not served: %s: %s", called, error.file, error.line)
            else:
                rejected[name] = error.line
                _log.error(
                    "model %s: the new version is not served, and %s goes on: %s: %s",
                    name,
                    models[name].digest,
                    error.file,
                    error.line,
                )
            continue
        if name is not None and name != found:
            del entries[name]
        entries[found] = entry
        for faults in (broken, rejected):
            faults.pop(found, None)
            faults.pop(folder.name, None)
        _log.warning("model %s: %s is served", found, findings.digest)
    if resolved(default, entries) is None and (kept := models.find(default)):
        entries[kept.name] = before.entries[kept.name]
        rejected[kept.name] = "its folder is gone; a default model cannot be removed while the server runs."
        _log.error("model %s: %s", kept.name, rejected[kept.name])
    for name in gone:
        if name not in entries:
            _log.warning("model %s is removed", name)
    return replace(before, entries=entries, broken=broken, rejected=rejected)


def _checked(folder: Path, findings: Findings, version: str | None, signers: Signers | None) -> tuple[str, Entry]:
    """Return name and entry of a verified artefact; see `Classifier.from_findings`, also for its errors."""
    findings.facts()
    content = read_file(folder / CARD_FILE)
    if signers is not None:
        signers.check(folder / CARD_FILE, content)
    card = parse_card(folder / CARD_FILE, content)
    check_card(folder, card, findings)
    return served_name(folder, card, version), Entry(folder, findings, content)

"""The served models by name: the one place where versions and aliases are resolved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from service.artefact.folders import split_name
from service.errors import ArtefactError, ModelNotAvailableError, UnknownModelError
from service.inference.classifier import Classifier


def resolved(name: str, served: Iterable[str]) -> str | None:
    """Return the served version that the name of a model or of a version means, of a model the highest, or null.

    Args:
        name: no alias.
        served: names of models and versions.
    """
    known = [one for one in served if name in (one, split_name(one)[0])]
    return max(known, key=split_name, default=None)


class Models(dict[str, Classifier]):
    """The served models by name; a version is `NAME:VERSION`. `models[name]` and `find` know further names, too."""

    further: dict[str, str]
    """Models by further names: for a model with versions the highest served one, for an alias its model."""
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
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """Store all by name.

        Args:
            served: the models.
            broken: models that could not be verified.
            rejected: reasons.
            aliases: see `service.settings.aliases_of`; one that stands for no model is unknown.
        """
        super().__init__(sorted(served.items(), key=lambda item: split_name(item[0])))
        self.broken = dict(sorted((broken or {}).items()))
        self.rejected = dict(rejected or {})
        names = {model: model for name in (*self, *self.broken) for model, version in [split_name(name)] if version}
        meant = {
            name: resolved(one, self) or resolved(one, self.broken)
            for name, one in (names | dict(aliases or {})).items()
        }
        self.further = {name: one for name, one in meant.items() if one is not None and name not in self}
        self.shapes = {name: self[name].input_shape for name in self}
        self.shapes |= {name: self.shapes[one] for name, one in self.further.items() if one in self}
        # A broken artefact takes its name from no other.
        reasons = {name: error.line for name, error in self.broken.items() if name not in self.shapes}
        meant_by_broken = {name: one for name, one in self.further.items() if one in reasons}
        self.reasons = reasons | {name: reasons[one] for name, one in meant_by_broken.items()}

    def __missing__(self, name: str) -> Classifier:
        """Return the model of a further name.

        Raises:
            ModelNotAvailableError: it is broken.
            UnknownModelError: there is no such model.
        """
        if (found := self.find(name)) is not None:
            return found
        if name in self.reasons:
            raise ModelNotAvailableError(name, self.reasons[name])
        raise UnknownModelError(name, self.shapes)

    @property
    def names(self) -> list[str]:
        """The names of models, without versions."""
        return list(dict.fromkeys(classifier.card.name for classifier in self.values()))

    def find(self, name: str) -> Classifier | None:
        """Return the model of a name, also a further one; null if it is not served."""
        return self.get(name) or self.get(self.further.get(name, name))

    def versions(self, name: str) -> list[Classifier]:
        """Return the served versions of a model, the highest first; of a version or an alias, and of a model without
        versions, the one that it names.

        Raises:
            ModelNotAvailableError, UnknownModelError: see `__missing__`.
        """
        found = self[name]
        if name != found.card.name:
            return [found]
        return [classifier for classifier in reversed(self.values()) if classifier.card.name == name]

    def aliases_of(self, classifier: Classifier) -> list[str]:
        """Return the further names of a model."""
        return sorted(name for name, one in self.further.items() if one == classifier.name)

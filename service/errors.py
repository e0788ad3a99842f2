"""What can go wrong, said without HTTP.

::

    LipcertError
      ├─ InputError                      the client sent something that has no answer
      │   ├─ EmptyBodyError
      │   ├─ BodyTooLargeError
      │   ├─ MediaTypeError
      │   ├─ MalformedBodyError          not JSON, not multipart, a part missing or twice
      │   ├─ OptionError                 an option with a value outside its range
      │   │   └─ UnknownOptionError
      │   ├─ Base64Error
      │   ├─ NotAnImageError             no decoder recognises the bytes, or they are cut short
      │   ├─ ImageFormatError            an image, but one that has no lossless reading as 8-bit pixels
      │   ├─ ImageTooLargeError          more pixels than the server decodes
      │   ├─ ArrayError                  npy: header, dtype or shape
      │   ├─ ImageSizeError              height and width are not the model's
      │   ├─ SideTooLongError            a height or width that is not resized
      │   ├─ MixedSizesError             images of several sizes in one batch
      │   ├─ ChannelsError               channels that the model does not take, or of two kinds in one batch
      │   ├─ PixelRangeError             NaN, infinite, or outside [0, 1]
      │   ├─ BatchTooLargeError
      │   ├─ UnknownModelError
      │   ├─ UnknownLabelError
      │   └─ TargetIsPredictedClassError
      ├─ BusyError                       the request is fine, and there is no room or time for it now
      │   ├─ OverloadedError
      │   └─ DeadlineError
      ├─ ArtefactError                   a file of an artefact is missing, damaged or has no proof
      ├─ ProviderError                   the asked-for execution provider is not there
      ├─ SettingsError                   a LIPCERT_* variable is unknown or invalid
      ├─ PortError                       the address to listen on is not to be had
      └─ KeptError                       a file that is audited is missing or is something else

The message of every error says what was expected and what to do; `service.api.problem` maps the tree to HTTP
status.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class LipcertError(Exception):
    """Anything this package raises on purpose; its message is a sentence or two for whoever reads it."""


class InputError(LipcertError):
    """The client sent something that has no answer; the message says what was expected."""

    def at_index(self, index: int) -> InputError:
        """The same error about image ``index`` of a batch (from 0); the type, hence the status, stays."""
        same_type = type(self).__new__(type(self))
        Exception.__init__(same_type, f"image {index}: {self}")
        same_type.__dict__.update(self.__dict__)
        return same_type


class EmptyBodyError(InputError):
    """The request or a part of it has no bytes."""


class BodyTooLargeError(InputError):
    """The body is longer than the limit of the server."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"the body is larger than {limit_bytes} bytes, the limit of this server; send a smaller image or "
            "fewer of them (whoever runs the server can raise LIPCERT_MAX_BODY_BYTES)"
        )


class MediaTypeError(InputError):
    """The Content-Type is missing or not one that the route reads."""

    def __init__(self, content_type: str | None, accepted: Iterable[str]) -> None:
        got = (
            "there is no Content-Type header" if not content_type else f"Content-Type {content_type!r} is not read here"
        )
        self.accepted = tuple(accepted)
        super().__init__(f"{got}; send one of: {', '.join(self.accepted)}")


class MalformedBodyError(InputError):
    """The body cannot be parsed as what its Content-Type says."""


class OptionError(InputError):
    """An option has a value outside its range."""


class UnknownOptionError(OptionError):
    """A field that is not an option; the message lists those that are."""

    def __init__(self, names: Iterable[str], known: Iterable[str], where: str) -> None:
        unknown = ", ".join(repr(name) for name in names)
        super().__init__(f"unknown field {unknown} in the {where}; known here: {', '.join(known)}")


class Base64Error(InputError):
    """The text is not standard base64 (RFC 4648 section 4)."""


class NotAnImageError(InputError):
    """No decoder recognises the bytes, or the file is truncated or damaged."""


class ImageFormatError(InputError):
    """An image whose pixels have no lossless reading as 8-bit grey or RGB."""


class ImageTooLargeError(InputError):
    """More pixels than the server is willing to decode."""

    def __init__(self, found: str, limit_pixels: int) -> None:
        super().__init__(
            f"the image is too large: {found}, and this server decodes at most {limit_pixels} pixels in one "
            "request; send a smaller image (whoever runs the server can raise LIPCERT_MAX_PIXELS)"
        )


class ArrayError(InputError):
    """An npy body whose header, dtype or shape is not one that the route reads."""


class ImageSizeError(InputError):
    """Height and width are not the model's and resizing was not asked for; sizes in pixels."""

    def __init__(self, height: int, width: int, expected_height: int, expected_width: int) -> None:
        super().__init__(
            f"the image is {height} x {width} (height x width) and the model takes {expected_height} x "
            f"{expected_width}; send that size, or set resize=true to have it resized (the radius then "
            "speaks about the image that was sent)"
        )


class SideTooLongError(InputError):
    """Height or width, the image's or the model's, is more than the server resizes; in pixels."""

    def __init__(self, side: int, expected_side: int, limit: int) -> None:
        super().__init__(
            f"a side of {side} pixels is not resized to {expected_side}, because this server resizes from and to at "
            f"most {limit}; send a smaller image, best of the model's size"
        )


class MixedSizesError(InputError):
    """A batch with images of several sizes; sizes in pixels."""

    def __init__(self, size_HW: tuple[int, ...], first_HW: tuple[int, ...]) -> None:
        super().__init__(
            f"this image is {size_HW[0]} x {size_HW[1]} (height x width) and the first one is {first_HW[0]} "
            f"x {first_HW[1]}; a batch has images of one size, send the others apart"
        )


class ChannelsError(InputError):
    """The image has channels that the model does not take, or others than the first of its batch."""


class PixelRangeError(InputError):
    """A pixel is NaN, infinite, or outside [0, 1]."""


class BatchTooLargeError(InputError):
    """More images in a batch than the server takes at once."""

    def __init__(self, images: int, limit: int) -> None:
        super().__init__(f"the batch has {images} images and this server takes 1 to {limit} at once; split it")


class UnknownModelError(InputError):
    """No artefact of this name is served."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"there is no model {name!r}; this server has: {', '.join(sorted(known))}")


class UnknownLabelError(InputError):
    """The wanted target is not a label of the model."""

    def __init__(self, label: str, labels: Iterable[str]) -> None:
        super().__init__(f"target {label!r} is not a label of the model; its labels are: {', '.join(labels)}")


class TargetIsPredictedClassError(InputError):
    """The counterfactual was asked to reach the class that the image already has."""

    def __init__(self, label: str) -> None:
        super().__init__(
            f"target {label!r} is already the predicted class of the image; name another label, or leave "
            "target out to get the nearest other class"
        )


class BusyError(LipcertError):
    """The request is fine, and the server has no room or time for it now; the same request may do later."""


class OverloadedError(BusyError):
    """As many requests are on their way as the server takes."""

    def __init__(self, requests: int) -> None:
        super().__init__(
            f"{requests} requests are being answered and no more fit in; send this one again after a pause, or raise "
            "LIPCERT_MAX_REQUESTS or LIPCERT_MAX_WAITING_BYTES"
        )


class DeadlineError(BusyError):
    """The deadline of a request passed before it was answered."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(
            f"there was no answer within {deadline_s:g} s; send the request again when the server is less busy, with a "
            "longer `Prefer: wait=SECONDS`, or raise LIPCERT_DEADLINE_S"
        )


class ArtefactError(LipcertError):
    """A file of an artefact is missing, damaged or has no proof; the server does not start with it."""

    def __init__(self, file: Path, reason: str) -> None:
        self.file = file
        self.reason = reason
        super().__init__(f"{file}: {reason}")


class ProviderError(LipcertError):
    """The execution provider that the settings ask for cannot be had on this machine."""


class SettingsError(LipcertError):
    """A ``LIPCERT_*`` variable is unknown or has an invalid value."""


class PortError(LipcertError):
    """The address to listen on is taken, not of this machine, or not allowed."""

    def __init__(self, host: str, port: int, cause: OSError) -> None:
        super().__init__(
            f"port {port} of {host} cannot be had ({cause.strerror or cause}); stop what holds it, or set LIPCERT_PORT "
            "or LIPCERT_HOST"
        )


class KeptError(LipcertError):
    """A file that is audited is missing or is not what it should be."""

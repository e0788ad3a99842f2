"""Domain errors of the service, independent of HTTP.

::

    LipcertError
      ├─ InputError                      the request cannot be answered
      │   ├─ RequestSyntaxError          not HTTP/1.1
      │   ├─ HeadTooLargeError           bytes or number of headers, or framing of a chunked body
      │   ├─ TargetTooLongError
      │   ├─ TooSlowError                the client stopped sending in the middle of a request
      │   ├─ EmptyBodyError
      │   ├─ BodyTooLargeError
      │   ├─ MediaTypeError
      │   ├─ ContentCodingError          a Content-Encoding that the server does not read
      │   ├─ MalformedBodyError          not JSON, not multipart, a part missing or repeated
      │   ├─ TooManyValuesError          a JSON body has more values than the route needs
      │   ├─ TooCostlyError              reading the body exceeds the limits of processor time or memory
      │   ├─ OptionError                 the value of an option is invalid
      │   │   └─ UnknownOptionError
      │   ├─ Base64Error
      │   ├─ NotAnImageError             no decoder recognises the bytes, or they are truncated
      │   ├─ ImageFormatError            an image that cannot be read losslessly as 8-bit pixels
      │   ├─ ImageTooLargeError          more pixels than the limit
      │   ├─ ArrayError                  header, dtype or shape of an npy array
      │   ├─ ImageSizeError              height or width differs from the model's
      │   ├─ SideTooLongError            a height or width above the limit of resizing
      │   ├─ MixedSizesError             different image sizes in one batch
      │   ├─ ChannelsError               channels that the model does not accept, or grey and RGB in one batch
      │   ├─ PixelRangeError             a pixel is NaN, infinite, or outside [0, 1]
      │   ├─ BatchTooLargeError
      │   ├─ PathTooLongError            the images of all paths have more pixels than the limit
      │   ├─ UnknownModelError
      │   ├─ UnknownVersionError         of a model of the Open Inference Protocol
      │   ├─ UnknownSampleError
      │   ├─ UnknownLabelError
      │   ├─ TargetIsPredictedClassError
      │   ├─ CalibrationError            the model has no calibration for the wanted coverage or error
      │   ├─ NoveltyError                the model has no novelty model here
      │   └─ ModelControlError           a model cannot be loaded or unloaded as it is
      ├─ BusyError                       the request is valid, and the server has no capacity for it now
      │   ├─ OverloadedError
      │   ├─ TooManyConnectionsError
      │   ├─ DeadlineError
      │   └─ DeviceLostError             the GPU has failed for good; the server ends and is started again
      ├─ AccessError                     the client may not ask this, or not now
      │   ├─ UnauthorizedError           no valid API key
      │   ├─ ForbiddenError              a valid API key without the scope
      │   └─ RateLimitError              more requests than the rate of a key or an address
      ├─ UnavailableError                the request is valid, and its model cannot answer before the operator acts
      │   ├─ ArtefactChangedError        its files are not those that were verified
      │   └─ ModelNotAvailableError      it could not be verified
      ├─ NotImplementedByServerError     a method, transfer coding or operation that this server does not have
      ├─ HttpVersionError                HTTP/2 or HTTP/3
      ├─ ArtefactError                   a file of an artefact is missing, damaged or cannot be proved
      ├─ ProviderError                   the requested execution provider is not available
      ├─ SettingsError                   a LIPCERT_* variable is unknown or invalid
      ├─ PortError                       the address to listen on is not available
      ├─ ClusterError                    Ray does not serve, or a replica of it is not healthy
      ├─ KeptError                       a file of an audit or of evidence is missing or of another kind
      └─ ImportRefusedError              an ONNX file cannot become an artefact

The message of every error states the cause, the expected value and the remedy; `service.api.problem` maps each class to
an HTTP status.
"""

from __future__ import annotations

from collections.abc import Iterable

from service.errors.access import AccessError as AccessError
from service.errors.access import ForbiddenError as ForbiddenError
from service.errors.access import RateLimitError as RateLimitError
from service.errors.access import UnauthorizedError as UnauthorizedError
from service.errors.base import LipcertError as LipcertError
from service.errors.operator import ArtefactError as ArtefactError
from service.errors.operator import ClusterError as ClusterError
from service.errors.operator import ImportRefusedError as ImportRefusedError
from service.errors.operator import KeptError as KeptError
from service.errors.operator import PortError as PortError
from service.errors.operator import ProviderError as ProviderError
from service.errors.operator import SettingsError as SettingsError
from service.errors.quotations import listed, quoted

# Of an 8-bit RGB file that is resized: 41 in the server, and 18 in the process that decodes.
_BYTES_OF_A_PIXEL = 60


class InputError(LipcertError):
    """The request cannot be answered; the message states the expected input."""

    def at_index(self, index: int) -> InputError:
        """Return this error for image `index` of a batch (from 0), of the same type and hence the same status."""
        same_type = type(self).__new__(type(self))
        Exception.__init__(same_type, f"image {index}: {self}")
        same_type.__dict__.update(self.__dict__)
        return same_type


class RequestSyntaxError(InputError):
    """The bytes are not a request of HTTP/1.1."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the request is not valid: {reason}; send HTTP/1.1 as RFC 9112 defines it")


class HeadTooLargeError(InputError):
    """A request has more bytes of headers, trailers or framing, or more headers, than the limit of the server."""


class TargetTooLongError(InputError):
    """Path and query are longer than the limit of the server."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"path and query are longer than {limit_bytes} bytes; send options in the body (the operator can raise "
            "LIPCERT_MAX_TARGET_BYTES)"
        )


class TooSlowError(InputError):
    """The client stopped sending in the middle of a request."""


class EmptyBodyError(InputError):
    """The body, or the image in it, is empty."""


class BodyTooLargeError(InputError):
    """The body is larger than the limit of the server."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"the body is larger than {limit_bytes} bytes, the limit of this server; send a smaller image or fewer "
            "images (the operator can raise LIPCERT_MAX_BODY_BYTES)"
        )


class MediaTypeError(InputError):
    """The Content-Type is missing or not supported by the route."""

    def __init__(self, content_type: str | None, accepted: Iterable[str]) -> None:
        got = f"Content-Type {quoted(content_type)} is not supported"
        if not content_type:
            got = "the Content-Type header is missing"
        self.accepted = tuple(accepted)
        super().__init__(f"{got}; send one of: {', '.join(self.accepted)}")


class ContentCodingError(InputError):
    """The Content-Encoding is not supported."""

    def __init__(self, coding: str, accepted: Iterable[str]) -> None:
        self.accepted = tuple(accepted)
        super().__init__(
            f"Content-Encoding {quoted(coding)} is not supported; send one of: {', '.join(self.accepted)}, or leave "
            "the body as it is and the header out"
        )


class MalformedBodyError(InputError):
    """The body cannot be parsed as its Content-Type."""


class TooManyValuesError(InputError):
    """A JSON body has more values than the route needs."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"the JSON has more values than this route needs, at most {limit}; send fewer images in one request (the "
            "operator can raise LIPCERT_MAX_BATCH or LIPCERT_MAX_PIXELS)"
        )


class TooCostlyError(InputError):
    """Reading the body takes more processor time or memory than any plain file of its size, or crashes a decoder."""

    def __init__(self) -> None:
        super().__init__(
            "reading this body exceeds the limits of this server for processor time or memory, or crashes its decoder; "
            "save the image again as a plain PNG and send that"
        )


class OptionError(InputError):
    """The value of an option is invalid."""


class UnknownOptionError(OptionError):
    """A field is not an option; the message lists the options."""

    def __init__(self, names: Iterable[str], known: Iterable[str], where: str) -> None:
        unknown = ", ".join(quoted(name) for name in names)
        super().__init__(f"unknown field {unknown} in the {where}; known fields: {listed(known)}")


class Base64Error(InputError):
    """The text is not standard base64 (RFC 4648 section 4)."""


class NotAnImageError(InputError):
    """No decoder recognises the bytes, or the file is truncated or damaged."""


class ImageFormatError(InputError):
    """The pixels of the image cannot be read losslessly as grey or RGB of 8 or 16 bits."""


class ImageTooLargeError(InputError):
    """The image has more pixels than the limit of the server."""

    def __init__(self, found: str, limit_pixels: int, needed_pixels: int | None = None) -> None:
        needed = ""
        if needed_pixels is not None:
            megabytes = -(-needed_pixels * _BYTES_OF_A_PIXEL // 10**6)
            needed = f" to {needed_pixels}, where such a request takes some {megabytes} MB of memory"
        super().__init__(
            f"the image is too large: {found}, and this server decodes at most {limit_pixels} pixels per request; send "
            f"a smaller image (the operator can raise LIPCERT_MAX_PIXELS{needed})"
        )


class ArrayError(InputError):
    """The header, dtype or shape of an array is invalid or not supported by the route."""


class ImageSizeError(InputError):
    """Height or width differs from the model's and resizing was not requested; sizes in pixels."""

    def __init__(self, height: int, width: int, expected_height: int, expected_width: int) -> None:
        super().__init__(
            f"the image is {height} x {width} (height x width) and the model takes {expected_height} x "
            f"{expected_width}; send that size, or set resize=true to resize it (the radius still refers to the image "
            "that was sent)"
        )


class SideTooLongError(InputError):
    """A height or width, of the image or of the model, is above the limit of resizing; in pixels."""

    def __init__(self, side: int, expected_side: int, limit: int) -> None:
        super().__init__(
            f"a side of {side} pixels is not resized to {expected_side}, because this server resizes from and to at "
            f"most {limit} pixels; send a smaller image, preferably of the model's size"
        )


class MixedSizesError(InputError):
    """The images of a batch have different sizes; sizes in pixels."""

    def __init__(self, size_HW: tuple[int, ...], first_HW: tuple[int, ...]) -> None:
        super().__init__(
            f"this image is {size_HW[0]} x {size_HW[1]} (height x width) and the first image is {first_HW[0]} x "
            f"{first_HW[1]}; all images of a batch must have the same size, send the others separately"
        )


class ChannelsError(InputError):
    """The channels of the image are not those that the model accepts, or differ from the first image of the batch."""


class PixelRangeError(InputError):
    """A pixel is NaN, infinite, or outside [0, 1]."""


class BatchTooLargeError(InputError):
    """The batch has more images than the limit of the server."""

    def __init__(self, images: int, limit: int) -> None:
        super().__init__(f"the batch has {images} images and this server accepts 1 to {limit} per batch; split it")


class PathTooLongError(InputError):
    """The paths of a request have more pixels than the limit of the server."""

    def __init__(self, count: int, pixels: int, limit_pixels: int) -> None:
        super().__init__(
            f"a path of {count} images for each image has {pixels} pixels in all, and this server answers with at most "
            f"{limit_pixels} per request; ask for a shorter path, or send fewer or smaller images (the operator can "
            "raise LIPCERT_MAX_PIXELS)"
        )


class UnknownModelError(InputError):
    """No served model has this name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"there is no model {quoted(name)}; available models: {listed(sorted(known))}")


class UnknownVersionError(InputError):
    """The served versions of a model are others."""

    def __init__(self, name: str, version: str, served: Iterable[str]) -> None:
        super().__init__(
            f"model {quoted(name)} has no version {quoted(version)}; it has {listed(served)}: name one of them, or "
            "leave the version out"
        )


class UnknownSampleError(InputError):
    """The model has no sample image of this number."""

    def __init__(self, model: str, n: int) -> None:
        super().__init__(f"model {quoted(model)} has {n} sample images, numbered from 0")


class UnknownLabelError(InputError):
    """The target is not a label of the model."""

    def __init__(self, label: str, labels: Iterable[str]) -> None:
        super().__init__(f"target {quoted(label)} is not a label of the model; its labels are: {listed(labels)}")


class TargetIsPredictedClassError(InputError):
    """The target of the counterfactual is the predicted class of the image."""

    def __init__(self, label: str) -> None:
        super().__init__(
            f"target {quoted(label)} is already the predicted class of the image; choose another label, or omit target "
            "to get the nearest other class"
        )


class CalibrationError(InputError):
    """The card of the model has no calibration that answers `coverage` or `max_error`."""


class NoveltyError(InputError):
    """The option `novelty` needs a novelty model, and that of the model is not served."""

    def __init__(self, name: str, named: str | None) -> None:
        super().__init__(
            f"{name} has no novelty model: "
            + (f"its card names {named}, which this server does not serve" if named else "its card names none")
            + "; leave the option novelty out (the operator can put a novelty model into the folder of models and name "
            "it with LIPCERT_NOVELTY_MODELS)"
        )


class BusyError(LipcertError):
    """The request is valid, and the server has no capacity for it now; a retry after `retry_after_s` may succeed."""

    retry_after_s: int = 1


class OverloadedError(BusyError):
    """The request would wait too long, or a limit of concurrent requests or of the bytes of their bodies is reached."""

    def __init__(self, settings: str, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"too many requests; retry after {retry_after_s} s (the operator can raise {settings})")


class TooManyConnectionsError(BusyError):
    """The limit of connections of the process, or of one address, is reached."""

    def __init__(self) -> None:
        super().__init__(
            "the server has too many open connections; send requests over fewer connections, or retry after a pause "
            "(the operator can raise LIPCERT_MAX_CONNECTIONS or LIPCERT_MAX_CONNECTIONS_PER_ADDRESS)"
        )


class DeadlineError(BusyError):
    """The deadline of a request passed before it was answered."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(
            f"no answer within {deadline_s:g} s; retry when the server is less busy, or with a longer `Prefer: "
            "wait=SECONDS` or `timeout` (the operator can raise LIPCERT_DEADLINE_S)"
        )


class DeviceLostError(BusyError):
    """The GPU has failed for good while the server ran; the process answers nothing more and ends."""

    def __init__(self) -> None:
        super().__init__("the GPU of this server was lost and the server is about to restart; send the request again")


class UnavailableError(LipcertError):
    """The request is valid, and its model cannot answer before the operator acts."""


class ArtefactChangedError(UnavailableError):
    """The files of a model are not those that were verified."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the files of model {name!r} have changed since this server verified them, so it does not answer; the "
            "operator can put them back, or send SIGHUP to the server, which verifies and serves the new ones"
        )


class ModelNotAvailableError(UnavailableError):
    """A model in the folder of models could not be verified."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"model {name!r} is not available: {reason} The operator can repair it and send SIGHUP to the server; GET "
            "/models lists the models that answer"
        )


class ModelControlError(InputError):
    """A model cannot be loaded or unloaded, because of its artefact or of its role in this server."""


class NotImplementedByServerError(LipcertError):
    """A method or transfer coding of HTTP, or an operation of a protocol, that this server does not implement."""


class HttpVersionError(LipcertError):
    """A version of HTTP that this server does not speak."""

    def __init__(self) -> None:
        super().__init__("this server speaks HTTP/1.1; send the request in that version, or put a proxy in front")

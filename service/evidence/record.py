"""Members of `evidence.json`; its JSON schema is that of these classes.

`check.py` of the folder reads the same members and shares no code with this module.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Bound = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Rational = Annotated[str, Field(pattern=r"^-?[0-9]+(/[0-9]+)?$")]


class _Member(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Identity(_Member):
    """Which classifier the evidence is about."""

    name: str
    labels: list[str]
    input_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Channels, height, width."""
    precision: Literal["float64", "float32"]
    n_outputs: PositiveInt
    """1: one output f, which stands for the logits (f, -f)."""
    digests: dict[str, Digest]
    """Of `model.onnx`, `card.json`, and the graphs `forward` and `gradient` that are written from the network."""


class Made(_Member):
    """When and where the folder was made; the only members that differ between two runs on machines of one kind."""

    date: str
    processor: str
    system: str
    provider: Literal["cpu"]
    versions: dict[str, str]


class Node(_Member):
    """Bounds that are proved up to one node, for every image of the box."""

    node: str
    operator: str
    """In the network that is proved and written."""
    lipschitz_bound: Bound
    """L2, from the image to the output of this node."""
    error: Bound
    """Bound of the L2 norm of computed minus exact output."""
    theorem: str
    source: str
    """Where the theorem and its implementation are."""


class NormCertificate(_Member):
    """A claim `norm_bound^2 I - W^T W` is positive semidefinite, W the weight of the node; `check.py` proves it."""

    node: str
    norm_bound: Bound


class Bounds(_Member):
    """The promise: `radius = min over j of (f_i - f_j - 4 logit_error) / margin_bounds[i][j]`."""

    lipschitz_bound: Bound
    """Of the logits together."""
    logit_error: Bound
    """Of |computed - exact| of every logit, every image of the box and every order of summation."""
    margin_bounds: list[list[Bound]]
    """`K_ij`: of `f_i - f_j`."""


class Replication(_Member):
    """The replication criterion, in the words of ARP6983 / ED-324."""

    criterion: str
    bound: Bound
    """`logit_error`."""


class TestVector(_Member):
    """An 8-bit image, its exact logits, and those that the runtime computes."""

    name: str
    file: str
    """uint8 array C x H x W; a pixel v is v / 255."""
    digest: Digest
    """As an answer of the service names the image."""
    exact_logits: list[tuple[Rational, Rational]]
    """Both ends of an interval around the logit of the exact network."""
    width: Bound
    """Of the widest interval, rounded upwards."""
    runtime_logits: list[Finite]
    largest_difference: Bound
    """Of a computed logit and its exact one."""
    class_id: int
    label: str
    radius: Bound
    runner_up: int


class Statement(_Member):
    """A share of test images, and an interval for the share of images drawn in the same way."""

    epsilon: Bound | None
    """L2 radius of certified accuracy; null for accuracy."""
    proof: Literal["fast", "best"] | None
    """Option `proof` of the answers that are counted: `best` uses reference images; null for accuracy."""
    successes: int
    n: PositiveInt
    share: Share
    low: Share
    high: Share
    statement: str


class OperatingDomain(_Member):
    """Statements about images that are drawn like the test set."""

    data: str
    confidence: Share
    """Of each interval for itself."""
    statements: list[Statement]
    without_interval: list[str]
    """Shares of the card without a number of images, and why."""


class Assumption(_Member):
    """An assumption of docs/soundness.md, by its number there."""

    number: PositiveInt
    title: str
    text: str
    tests: list[str]
    """That would notice its loss; empty: no test can."""


class Evidence(_Member):
    """All that an engineer who signs for a classifier needs to read, and a machine to check."""

    format: Literal[1]
    identity: Identity
    made: Made
    derivation: list[Node]
    norms: list[NormCertificate]
    bounds: Bounds
    replication: Replication
    test_vectors: list[TestVector]
    operating_domain: OperatingDomain
    assumptions: list[Assumption]
    not_covered: list[str]

"""Sentences of an evidence folder: assumptions by number, the replication criterion, limits."""

from __future__ import annotations

from service.evidence.record import Assumption

_TESTS = "tests/service/certificate/"

ASSUMPTIONS = (
    Assumption(
        number=1,
        title="Arithmetic",
        text="The processor and the provider round each basic operation to nearest in the graph's format (IEEE 754), "
        "or fuse a product and a sum with one rounding. Results in the subnormal range may be flushed to zero.",
        tests=[
            f"{_TESTS}test_random_graphs.py::test_no_computed_tensor_is_further_from_the_exact_one_than_its_error_bound",
            f"{_TESTS}test_random_graphs.py::test_the_exact_evaluations_agree_with_each_other_and_with_the_runtime",
        ],
    ),
    Assumption(
        number=2,
        title="Sums in any order",
        text="A matrix product is computed by products and sums, in any order, with any blocking, on any number of "
        "threads. Strassen, Winograd, FFT and TF32 are outside.",
        tests=[
            "tests/benchmarks/test_boundary.py::test_batch_threads_and_optimisation_move_no_radius_by_more_than_the_error",
            "tests/service/runtime/test_session.py::test_a_session_on_a_gpu_has_no_fallback_no_tf32_and_the_limit_of_memory",
        ],
    ),
    Assumption(
        number=3,
        title="The graph that runs is the graph that was proved",
        text="The runtime gets a graph that is written from the network that was proved, with every optimisation off; "
        "each operator is one kernel, which computes the operator of the ONNX specification.",
        tests=[
            "tests/service/runtime/test_session.py::test_every_node_of_a_graph_is_one_kernel",
            "tests/service/network/test_random_networks.py::test_a_network_that_is_written_is_read_back",
        ],
    ),
    Assumption(
        number=4,
        title="The certifier's own arithmetic",
        text="It is numpy's float64, rounded to nearest; its matrix products and Cholesky factorisations satisfy "
        "assumption 2.",
        tests=[
            f"{_TESTS}test_norms.py::test_spectral_bound_is_never_below_the_norm_in_exact_arithmetic",
            "tests/service/evidence/test_shipped.py::test_the_second_program_accepts_the_folder_of_a_shipped_model",
        ],
    ),
    Assumption(
        number=5,
        title="Elementary functions",
        text="exp, log, tanh, erf and the activations made of them are within 64 u max(scale, |y|) of the exact value. "
        "Without bearing on a graph that has no smooth activation.",
        tests=[
            f"{_TESTS}rules/test_activations.py::test_no_smooth_network_violates_its_bounds",
        ],
    ),
    Assumption(
        number=6,
        title="Memory and hardware do what they should",
        text="Bit flips, a compromised process and a wrong clock are outside.",
        tests=[],
    ),
)
"""The assumptions of docs/soundness.md, which a test compares by number and title."""

REPLICATION = (
    "Approximated replication of the ML model description (the exact real-number network of model.onnx) by the "
    "implementation (the float64 or float32 graph in ONNX Runtime): for every image of [0, 1]^d, every batch, number "
    "of threads and order of summation, each computed logit is within `bound` of the exact logit. A certified class is "
    "the class of the exact network and of every such implementation."
)

NOT_COVERED = (
    "Whether a class is right: certificates are about stability. Accuracy is a statistical statement about images "
    "drawn like the test set.",
    "Changes other than small L2 distances between decoded images: shifts, rotations, lighting, other norms.",
    "Images outside of the operating domain: the service has no detector for them.",
    "Decoding of image files, and everything between the scene and the decoded pixels.",
    "Adequacy of the data: whether training and test images represent the operation, and are labelled right.",
    "The runtime, numpy, compiler and processor beyond the assumptions: their qualification is not in this folder.",
    "Timing, availability, access control and the other security of the deployed system.",
    "Fitness for an intended use, and requirements above the classifier: this folder is no safety case.",
)

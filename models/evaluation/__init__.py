"""Evaluation of artefacts as they are served: figures of a test set, attacks from public libraries, the report."""

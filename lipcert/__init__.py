"""The command `lipcert`: one name for the command lines of service, certificate and models."""

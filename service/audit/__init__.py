"""`python -m service audit`: whether an answer that was kept still holds, derived anew in ball arithmetic.

Shares no numeric code with the server: nothing of `service.certificate`, `preprocessing`, `classifier` or `engine` is
imported, only the decoding of image files. See docs/audit.md.
"""

from service.audit.verdict import Conclusion, Verdict, audit

__all__ = ["Conclusion", "Verdict", "audit"]

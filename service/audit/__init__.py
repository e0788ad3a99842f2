"""`lipcert audit`: an archived answer, derived a second time in exact and ball arithmetic.

Shares no numeric code with the server, only the decoding of image files. See docs/audit.md.
"""

from service.audit.findings import Conclusion
from service.audit.verdict import Verdict, audit

__all__ = ["Conclusion", "Verdict", "audit"]

"""Which experts matter: one small pure function per criterion, from what is known to scores (E,).

Higher is kept. Ties are broken by mean α, then by the lower id, in `ranked`.
"""

from expertcut.interventions.criteria.scoring import CRITERIA, ranked

__all__ = ["CRITERIA", "ranked"]

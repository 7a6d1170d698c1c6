"""Every kind of file that the program reads, and how it reads it: the one list that all of these tests go by."""

from mutations.kinds_of_models import MODELS
from mutations.kinds_of_runs import RUNS
from mutations.kinds_of_users import USERS

KINDS = {kind.name: kind for kind in (*RUNS, *MODELS, *USERS)}

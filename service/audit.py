"""`python -m service audit`: whether an answer that was kept still holds, derived anew in ball arithmetic."""

"""Access: API keys, their scopes, and limits of requests per client."""

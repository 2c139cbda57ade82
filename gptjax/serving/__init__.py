"""Models as an HTTP server in OpenAI's protocol, and a page to chat in."""

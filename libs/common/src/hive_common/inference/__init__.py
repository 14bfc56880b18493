"""Model calls: the port between the HTTP surfaces, the router and the back ends, in OpenAI's shape."""

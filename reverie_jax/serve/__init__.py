"""An endpoint with OpenAI's chat completions API for one model: for evaluation, annotation and a lab's own use."""

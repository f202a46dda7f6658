"""The same engine behind HTTP, in the dialect of OpenAI's API and vLLM's extensions. A request meets the modules in this order:

args, server           the command line; the socket, the signals, a clean end
app, auth              routes; who may call them
protocol, fields       what a body may hold; what each further field means here
prompts, sampling      from a body to token ids and `SamplingParams`
service                one engine, its names, the way in
metrics                what has happened, as numbers for Prometheus and as a line in the log
http_metrics           the same of HTTP itself: routes, statuses, seconds
page, live             a page in the browser: a chat, and the engine at work
streams, answers       many outputs into one answer, whole or as events
completions, chat      the two shapes of an answer
logprobs, errors       the parts that both share

    python -m minivllm.serve
"""

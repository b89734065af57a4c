"""The floor: no sessions, no LangChain, no checks. Trio and httpx2 read events, Hypercorn sends a frame for each."""

import json
import os

import httpx2
import trio

http = httpx2.AsyncClient(timeout=None, trust_env=False, limits=httpx2.Limits(max_connections=None))
URL = os.environ["LLM_BASE_URL"] + "/chat/completions"


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "http":
        body = b'{"session_id":"one"}'
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": body})
    else:
        await send({"type": "websocket.accept"})
        async with trio.open_nursery() as nursery:
            while (event := await receive())["type"] != "websocket.disconnect":
                if event["type"] == "websocket.receive":
                    nursery.start_soon(relay, json.loads(event["text"]), send)
            nursery.cancel_scope.cancel()


async def relay(message, send):
    async def tell(method, **params):
        frame = {"jsonrpc": "2.0", "method": method, "params": params}
        await send({"type": "websocket.send", "bytes": None, "text": json.dumps(frame, separators=(",", ":"))})

    body = {"model": "mock", "messages": message["params"]["history"], "stream": True}
    text, rest = "", b""
    async with http.stream("POST", URL, json=body) as response:
        async for data in response.aiter_raw():
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                choices = [] if event == b"data: [DONE]" else json.loads(event[6:])["choices"]
                if choices and (piece := choices[0]["delta"].get("content")):
                    text += piece
                    await tell("text_chunk", chunk=piece)
    await tell("end", final_text=text)

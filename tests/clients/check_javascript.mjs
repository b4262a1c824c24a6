// Clients in JavaScript against the gateway. Runs in the folder of its packages; prints a line of JSON for each check.

const url = process.env.GATEWAY_URL;
// A second gateway, which refuses callers without this key.
const locked = process.env.GATEWAY_LOCKED_URL;
const key = process.env.GATEWAY_KEY;
const scores = JSON.parse(process.env.GATEWAY_SCORES);
const documents = JSON.parse(process.env.GATEWAY_DOCUMENTS);
const query = process.env.GATEWAY_QUERY;
const model = "rerank-v3.5";
const order = documents.map((_, at) => at).sort((one, other) => scores[other] - scores[one]);

async function check(client, what, found) {
  const line = { client, what, ok: true, said: "" };
  try {
    const positions = await found();
    line.ok = JSON.stringify(positions) === JSON.stringify(order);
    line.said = line.ok ? "" : `order ${positions}, expected ${order}`;
  } catch (error) {
    Object.assign(line, { ok: false, said: `${error.name}: ${error.message}`.slice(0, 300) });
  }
  console.log("CHECK", JSON.stringify(line));
}

const indexes = (results) => results.map((result) => result.index);

await check("cohere-ai", "CohereClientV2.rerank", async () => {
  const { CohereClientV2 } = await import("cohere-ai");
  const client = new CohereClientV2({ token: "key", environment: url });
  return indexes((await client.rerank({ model, query, documents })).results);
});

await check("cohere-ai", "CohereClient.rerank v1", async () => {
  const { CohereClient } = await import("cohere-ai");
  const client = new CohereClient({ token: "key", environment: url });
  return indexes((await client.rerank({ query, documents, returnDocuments: true })).results);
});

await check("@langchain/cohere", "CohereRerank.rerank", async () => {
  const { CohereRerank } = await import("@langchain/cohere");
  const { CohereClient } = await import("cohere-ai");
  const client = new CohereClient({ token: "key", environment: url });
  const ranker = new CohereRerank({ apiKey: "key", model, client });
  return indexes(await ranker.rerank(documents, query, { topN: documents.length }));
});

await check("@ai-sdk/cohere", "rerank", async () => {
  const { rerank } = await import("ai");
  const { createCohere } = await import("@ai-sdk/cohere");
  const cohere = createCohere({ apiKey: "key", baseURL: `${url}/v2` });
  const { ranking } = await rerank({ model: cohere.reranking(model), query, documents });
  return ranking.map((result) => result.originalIndex);
});

await check("voyageai (JavaScript)", "rerank", async () => {
  const { VoyageAIClient } = await import("voyageai");
  const client = new VoyageAIClient({ apiKey: "key", environment: `${url}/v1` });
  return indexes((await client.rerank({ query, documents, model: "rerank-2" })).data);
});

async function checkKeys(client, expected, found) {
  await check(client, `a wrong key is ${expected}, the right one is let in`, async () => {
    const positions = await found(key);
    try {
      await found("wrong");
    } catch (error) {
      if (error.constructor.name === expected || error.statusCode === 401) return positions;
      throw error;
    }
    throw new Error("no error");
  });
}

await checkKeys("cohere-ai", "UnauthorizedError", async (token) => {
  const { CohereClientV2 } = await import("cohere-ai");
  return indexes((await new CohereClientV2({ token, environment: locked }).rerank({ model, query, documents })).results);
});

await checkKeys("@ai-sdk/cohere", "AI_APICallError", async (apiKey) => {
  const { rerank } = await import("ai");
  const { createCohere } = await import("@ai-sdk/cohere");
  const cohere = createCohere({ apiKey, baseURL: `${locked}/v2` });
  const { ranking } = await rerank({ model: cohere.reranking(model), query, documents, maxRetries: 0 });
  return ranking.map((result) => result.originalIndex);
});

await checkKeys("voyageai (JavaScript)", "UnauthorizedError", async (apiKey) => {
  const { VoyageAIClient } = await import("voyageai");
  const client = new VoyageAIClient({ apiKey, environment: `${locked}/v1` });
  return indexes((await client.rerank({ query, documents, model: "rerank-2" })).data);
});

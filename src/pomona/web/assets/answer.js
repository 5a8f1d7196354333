// How an outcome becomes an answer: the rules of `pomona.model.answer`, the form of the service.

/**
 * @param {Float32Array} probabilities of all labels
 * @param {number} score below the threshold: unknown
 * @param {{labels: string[], threshold: number, reason: string}} about device.json
 * @param {number} top how many of the nearest labels
 */
export function answerOf(probabilities, score, about, top) {
  // Ties keep the labels' order, as a stable sort does.
  const order = Array.from(probabilities.keys())
    .sort((a, b) => probabilities[b] - probabilities[a] || a - b)
    .slice(0, top);
  const unknown = score < about.threshold;
  return {
    label: unknown ? null : about.labels[order[0]],
    probability: probabilities[order[0]],
    unknown,
    reason: unknown ? about.reason : null,
    score,
    nearest: order.map((n) => ({ label: about.labels[n], probability: probabilities[n] })),
    error: null,
  };
}

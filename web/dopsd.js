// Colours: one family for the nodes of D-OPSD, and one for each kind of link that only they have.
import { app } from "../../scripts/app.js";

// Dark, as ComfyUI's own node colours are: in light themes the page lightens them itself.
const NODE = { color: "#1c3040", bgcolor: "#263e4f" };
const LINKS = { DOPSD_DATASET: "#9ccc65", DOPSD_CONDITIONS: "#ff8a50", DOPSD_VISION: "#4dd0e1" };

// A theme that comes on empties the colours of all types that it does not know; one that knows ours is obeyed.
function setColor(colors, type) {
    let color = colors[type] || LINKS[type];
    Object.defineProperty(colors, type, {
        get: () => color,
        set: (wanted) => (color = wanted || LINKS[type]),
        enumerable: true,
        configurable: true,
    });
}

app.registerExtension({
    name: "D-OPSD.Colors",

    setup() {
        for (const type of Object.keys(LINKS)) {
            setColor(app.canvas.default_connection_color_byType, type); // slots of the classic canvas
            setColor(app.canvas.constructor.link_type_colors, type); // links of both
        }
        const slots = document.createElement("style"); // slots of Nodes 2.0; a theme's own go before it
        const rules = Object.entries(LINKS).map(([type, color]) => `--color-datatype-${type}: ${color};`);
        slots.textContent = `:root { ${rules.join(" ")} }`;
        document.head.append(slots);
    },

    nodeCreated(node) {
        const isOurs = node.comfyClass?.startsWith("DOPSD_");
        // a node of a saved workflow keeps the colour it was saved with, and none if the user took it off
        if (isOurs && !app.configuringGraph && !node.color && !node.bgcolor) Object.assign(node, NODE);
    },
});

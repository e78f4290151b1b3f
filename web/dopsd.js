// Colours of the nodes and links of D-OPSD, and widgets that a preset fills in.
import { app } from "../../scripts/app.js";

// Dark, as ComfyUI's own node colours are: in light themes the page lightens them itself.
const NODE = { color: "#1c3040", bgcolor: "#263e4f" };
const LINKS = { DOPSD_DATASET: "#9ccc65", DOPSD_CONDITIONS: "#ff8a50", DOPSD_VISION: "#4dd0e1", DOPSD_SETTINGS: "#b39ddb" };

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

// -- D-OPSD Train LoRA and Training Settings -------------------------------------------------------------------------

const TRAIN = "DOPSD_TrainLoRA";
const SETTINGS = "DOPSD_TrainingSettings";

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

// What the schema says beside an input: the tables from which widgets are filled in.
const declared = (node, name) => {
    const inputs = node.constructor.nodeData?.input ?? {};
    return (inputs.required?.[name] ?? inputs.optional?.[name])?.[1] ?? {};
};

function afterChange(widget, act) {
    const before = widget.callback;
    widget.callback = function (...args) {
        const result = before?.apply(this, args);
        act();
        return result;
    };
}

function setHidden(node, widget, hidden) {
    widget.hidden = hidden; // the classic canvas
    widget.options = widget.options ?? {};
    widget.options.hidden = hidden; // Nodes 2.0
}

// Inputs of release 0.2 that Training Settings has now: seen only where a saved graph sets them.
function showFormerThatAreSet(node) {
    for (const widget of node.widgets ?? []) {
        const { hidden, default: usual } = declared(node, widget.name);
        if (hidden) setHidden(node, widget, widget.value === usual);
    }
}

function fillSteps(node) {
    const steps = declared(node, "preset").dopsd_steps?.[widgetOf(node, "preset").value];
    if (steps !== undefined) widgetOf(node, "steps").value = steps;
}

function fillSettings(node) {
    const table = declared(node, "model_family").dopsd_fill ?? {};
    const values = table[widgetOf(node, "model_family").value]?.[widgetOf(node, "preset").value] ?? {};
    for (const [name, value] of Object.entries(values)) {
        const widget = widgetOf(node, name);
        if (widget) widget.value = value;
    }
    node.graph?.setDirtyCanvas(true, true);
}

app.registerExtension({
    name: "D-OPSD.Settings",

    nodeCreated(node) {
        if (node.comfyClass === TRAIN) {
            afterChange(widgetOf(node, "preset"), () => fillSteps(node));
            if (!app.configuringGraph) fillSteps(node);
            showFormerThatAreSet(node);
            if (!app.configuringGraph) node.setSize(node.computeSize());
        }
        if (node.comfyClass === SETTINGS) {
            for (const name of ["model_family", "preset"]) afterChange(widgetOf(node, name), () => fillSettings(node));
        }
    },

    // after the values of a saved graph are in place
    loadedGraphNode(node) {
        if (node.comfyClass === TRAIN) showFormerThatAreSet(node);
    },
});

// Command gitops-health tells what Argo CD's and Flux's own code take resources for, as JSON:
//
//	gitops-health HEALTH.LUA KUSTOMIZATION.YAML RESOURCE.YAML...
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// Verdict is what an engine takes a resource for.
type Verdict struct {
	Status  string `json:"status"`
	Message string `json:"message"`
}

// Engine judges a resource.
type Engine func(*unstructured.Unstructured) (Verdict, error)

func main() {
	if err := judge(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "gitops-health:", err)
		os.Exit(1)
	}
}

func judge(arguments []string) error {
	if len(arguments) < 3 {
		return fmt.Errorf("usage: gitops-health HEALTH.LUA KUSTOMIZATION.YAML RESOURCE.YAML")
	}
	argo, err := newArgo(arguments[0])
	if err != nil {
		return err
	}
	flux, err := newFlux(arguments[1])
	if err != nil {
		return err
	}
	verdicts := map[string]map[string]Verdict{}
	for _, file := range arguments[2:] {
		resource, err := read(file)
		if err != nil {
			return err
		}
		verdicts[file] = map[string]Verdict{}
		for name, engine := range map[string]Engine{"argo": argo, "flux": flux} {
			verdict, err := engine(resource)
			if err != nil {
				return fmt.Errorf("%s: %s: %w", file, name, err)
			}
			verdicts[file][name] = verdict
		}
	}
	return json.NewEncoder(os.Stdout).Encode(verdicts)
}

// read reads a resource as clients of the API server do: whole numbers are integers.
func read(file string) (*unstructured.Unstructured, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	asJSON, err := yaml.YAMLToJSON(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	resource := &unstructured.Unstructured{}
	if err := resource.UnmarshalJSON(asJSON); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return resource, nil
}

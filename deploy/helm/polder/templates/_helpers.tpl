{{- define "polder.labels" -}}
app.kubernetes.io/name: polder
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "polder.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- /* The members of etcd, as a list of JSON. */ -}}
{{- define "polder.endpoints" -}}
{{- $endpoints := .Values.etcd.endpoints | default list -}}
{{- range $address := .Values.etcd.bundled.members -}}
{{- $endpoints = append $endpoints (printf "https://%s:%v" (include "polder.host" $address) $.Values.etcd.bundled.clientPort) -}}
{{- end -}}
{{- $endpoints | toJson -}}
{{- end }}

{{- /* An address as it is written in a URL. */ -}}
{{- define "polder.host" -}}
{{- if contains ":" . }}[{{ . }}]{{ else }}{{ . }}{{ end -}}
{{- end }}

{{- /* Whether etcd wants certificates: the agent refuses a mixture of http:// and https://. */ -}}
{{- define "polder.tls" -}}
{{- with include "polder.endpoints" . | fromJsonArray }}{{ if hasPrefix "https://" (first .) }}true{{ end }}{{ end -}}
{{- end }}

{{- /*
What every container gets besides its capabilities. User 0 without a capability is what owns the host's folders. No profile of
AppArmor is named: on a host with AppArmor the runtime's default is the default, and elsewhere (kind, Talos, Red Hat) the kubelet
refuses a pod that names one.
*/ -}}
{{- define "polder.security" -}}
runAsUser: 0
runAsGroup: 0
runAsNonRoot: false
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
seccompProfile:
  type: RuntimeDefault
{{- with .Values.seLinuxType }}
seLinuxOptions:
  type: {{ . }}
{{- end }}
{{- end }}

{{- /* What the pods of all DaemonSets have in common. */ -}}
{{- define "polder.pod" -}}
hostNetwork: true
dnsPolicy: Default
enableServiceLinks: false
automountServiceAccountToken: false
serviceAccountName: polder
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* On which nodes the agent runs. */ -}}
{{- define "polder.nodes" -}}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "polder.nodeName" -}}
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
{{- end }}
